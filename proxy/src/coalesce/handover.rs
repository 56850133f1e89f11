//! How the tensors of an execution reach the server: as the pieces that they came in, or by shared memory.

use std::rc::Rc;

use penstock_api::Reason;
use penstock_inference::oip::batch::{self, Joined};
use penstock_inference::oip::{InferRequest, InferResponse};

use super::call::{self, Trouble, Way};
use super::learn::Known;
use crate::failure::Failure;
use crate::worker::Worker;

/// Asks the model for all of these together.
pub async fn infer<'a>(
    worker: &Rc<Worker>,
    way: &Way,
    model: &str,
    version: &str,
    requests: impl IntoIterator<Item = &'a InferRequest>,
    rows: u32,
    known: &Known,
) -> Result<InferResponse, Trouble> {
    let joined = batch::join(requests).ok_or_else(|| {
        Failure::new(
            Reason::Internal,
            "requests were to share an execution that differ in more than their rows",
        )
    })?;
    let _ = rows;
    by_bytes(worker, way, model, version, joined, known).await
}

async fn by_bytes(
    worker: &Rc<Worker>,
    way: &Way,
    model: &str,
    version: &str,
    joined: Joined,
    known: &Known,
) -> Result<InferResponse, Trouble> {
    call::infer(worker, way, model, version, joined, known.binary).await
}
