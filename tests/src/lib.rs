//! Starts the built programs and watches them from outside; see `tests/`.
