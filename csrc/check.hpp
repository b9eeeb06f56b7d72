#pragma once

#include <sstream>
#include <stdexcept>

namespace volcast {

// Throws std::invalid_argument (Python: ValueError) with "[op] part part ...".
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
    std::ostringstream text;
    text << '[' << op << "] ";
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
    if (!ok) fail(op, parts...);
}

}  // namespace volcast
