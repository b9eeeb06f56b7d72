"""Programs for a device: plain data, a planned memory, and what runs them. Needs torch; nothing else imports it."""
