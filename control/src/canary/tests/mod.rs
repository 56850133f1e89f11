//! A canary from its first look to its last, in a mesh that is made up: no proxy, no clock.

mod deployments;
mod properties;
mod strategies;
mod verdicts;
mod world;
