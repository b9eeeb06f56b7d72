"""Operations with a contract, an eager definition and a fused Triton-language form."""
