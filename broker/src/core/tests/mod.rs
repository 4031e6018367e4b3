//! The core's promises, proved.

mod allowed;
mod blocks;
mod budgets;
mod comparison;
mod consequences;
mod deeds;
mod fairness;
mod faults;
mod fixture;
mod history;
mod holding;
mod lending;
mod lifecycle;
mod lines;
mod operations;
mod operators;
mod oracle;
mod properties;
mod restarts;
mod service;
mod sessions;
mod steps;
mod weights;
mod world;
