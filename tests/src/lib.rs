//! Tests that cross crates live in `tests/`, next to this folder; the library itself is empty.
