//! Why a request was not answered with an inference, and how each wire says so.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use penstock_inference::oip::{Error, ErrorBody};

/// The sentence is for the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The request makes no sense to the model.
    #[error("{0}")]
    Invalid(String),
    /// There is no such model or version.
    #[error("{0}")]
    NotFound(String),
    /// The body is larger than we read.
    #[error("{0}")]
    TooLarge(String),
    /// All threads are busy and the queue is full. Nothing was done; another replica may have room.
    #[error("{0}")]
    Busy(String),
    /// The model failed.
    #[error("{0}")]
    Failed(String),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, axum::Json(ErrorBody { error: self.to_string() })).into_response()
    }
}

impl From<Refusal> for tonic::Status {
    fn from(refusal: Refusal) -> Self {
        let sentence = refusal.to_string();
        match refusal {
            Refusal::Invalid(_) => Self::invalid_argument(sentence),
            Refusal::NotFound(_) => Self::not_found(sentence),
            Refusal::TooLarge(_) => Self::resource_exhausted(sentence),
            Refusal::Busy(_) => Self::unavailable(sentence),
            Refusal::Failed(_) => Self::internal(sentence),
        }
    }
}
