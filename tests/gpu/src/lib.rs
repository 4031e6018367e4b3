//! The conformance suite of the device layer. The same checks run for the host backend, for the CUDA backend with a
//! stub driver, and for the CUDA backend on real GPUs. Checks return errors and do not panic, so that a plain program
//! can run them on a machine without a toolchain.

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
pub mod stitched;
pub mod subject;
