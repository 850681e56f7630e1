//! Integration tests of the C++ shim: CPU kernels and Gloo.

mod cpu_kernels;
mod gloo;
