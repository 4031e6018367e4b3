//! The broker as its clients and its operator meet it: real sockets, real files, real processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_input;
mod binary;
mod fd_socket;
mod grpc;
mod node;
mod operator;
mod restart;
mod watch;
