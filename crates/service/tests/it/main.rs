//! Integration tests of the service building blocks, in one binary.

mod chat;
mod name_resolution;
mod tls;
