//! The sidecar: routes, balances and secures the traffic of one pod.
//!
//! A request of the application is read in [`outbound`], one of the mesh in [`inbound`]; each is a list of stages, and
//! each stage is a module: accept, detect, route, split, balance, send, report. What the stages decide by is in
//! [`config`]; [`worker`] says what is shared and what is not.

pub mod accept;
pub mod access;
pub mod admin;
pub mod admission;
pub mod age;
pub mod answer;
pub mod backoff;
pub mod body;
pub mod coalesce;
pub mod config;
pub mod connection;
pub mod detect;
pub mod drain;
pub mod early;
pub mod exchange;
pub mod failure;
pub mod files;
pub mod fleet;
pub mod flood;
pub mod headers;
pub mod held;
pub mod http1;
pub mod identity;
pub mod inbound;
pub mod kept;
pub mod limits;
pub mod loaded;
pub mod local;
pub mod memory;
pub mod models;
pub mod oob;
pub mod outbound;
pub mod outside;
pub mod prepare;
pub mod probe;
pub mod rates;
pub mod readahead;
pub mod receive;
pub mod report;
pub mod rest;
pub mod route;
pub mod run;
pub mod send;
pub mod serve;
pub mod shadow;
pub mod signals;
pub mod splice;
pub mod tcp;
pub mod tee;
pub mod telemetry;
pub mod upgrade;
pub mod work;
pub mod worker;
pub mod xds;
