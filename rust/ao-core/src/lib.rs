//! Packing of activation-oracle training data, without Python.
//!
//! [`frame::Framer`] turns contexts, questions and answers into aligned token ids; [`pack::PackWriter`] turns examples
//! into shards that [`layout`] reads back; [`plan::plan`] says which datapoints make a training step. All randomness is
//! keyed by seed and id, so the same input gives the same bytes whatever the number of threads.

#![deny(missing_docs)]

pub mod activations;
mod affine;
mod align;
mod build;
pub mod columns;
pub mod datapoint;
mod engine;
pub mod error;
pub mod example;
pub mod folder;
pub mod frame;
pub mod layout;
pub mod lens;
pub mod locate;
pub mod manifest;
mod memo;
mod older;
pub mod pack;
pub mod plan;
mod prove;
pub mod rows;
pub mod sample;
mod settings;
pub mod shard;
pub mod source;
pub mod span;
pub mod stats;
pub mod template;
pub mod tokenize;
mod turns;

pub use error::{Error, Result};
