//! The conformance suite of the device layer: the same checks for the host backend, the CUDA backend over a stub
//! driver, and the CUDA backend on real GPUs. Checks return errors instead of panicking, so that a plain program
//! can run them on a machine that has no toolchain.

pub mod bench;
pub mod capture;
pub mod collision;
pub mod conformance;
pub mod engine;
pub mod full_stack;
pub mod links;
pub mod operation;
pub mod pattern;
pub mod peer;
pub mod subject;
