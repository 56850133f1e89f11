//! `inference.GRPCInferenceService`.

use crate::Server;
use crate::refusal::Refusal;
use futures_util::{Stream, StreamExt as _};
use penstock_inference::oip::grpc::{
    Contents, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse, Server as GrpcServer, Service,
    decode_request, encode_response, pb,
};
use std::pin::Pin;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// The service, for the router.
pub(crate) fn service(server: Arc<Server>) -> GrpcServer<Inference> {
    let limit = server.max_body;
    GrpcServer::new(Inference(server)).max_decoding_message_size(limit).max_encoding_message_size(limit)
}

/// The server as gRPC sees it.
pub(crate) struct Inference(Arc<Server>);

/// The answer is raw, whatever form the question had: Triton's clients expect that.
async fn infer(server: &Server, message: ModelInferRequest) -> Result<ModelInferResponse, Refusal> {
    let model = server.models.find(&message.model_name, Some(&message.model_version))?;
    let asked = decode_request(message)?;
    let response = server.engine.infer(model, asked).await?;
    Ok(encode_response(response, Contents::Raw)?)
}

#[tonic::async_trait]
impl Service for Inference {
    async fn server_live(
        &self,
        _: Request<pb::ServerLiveRequest>,
    ) -> Result<Response<pb::ServerLiveResponse>, Status> {
        Ok(Response::new(pb::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<pb::ServerReadyRequest>,
    ) -> Result<Response<pb::ServerReadyResponse>, Status> {
        Ok(Response::new(pb::ServerReadyResponse { ready: self.0.is_ready() }))
    }

    async fn model_ready(
        &self,
        request: Request<pb::ModelReadyRequest>,
    ) -> Result<Response<pb::ModelReadyResponse>, Status> {
        let pb::ModelReadyRequest { name, version } = request.into_inner();
        self.0.models.find(&name, Some(&version))?;
        Ok(Response::new(pb::ModelReadyResponse { ready: self.0.is_ready() }))
    }

    async fn server_metadata(
        &self,
        _: Request<pb::ServerMetadataRequest>,
    ) -> Result<Response<pb::ServerMetadataResponse>, Status> {
        let metadata = self.0.metadata();
        Ok(Response::new(pb::ServerMetadataResponse {
            name: metadata.name,
            version: metadata.version,
            extensions: metadata.extensions,
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<pb::ModelMetadataRequest>,
    ) -> Result<Response<pb::ModelMetadataResponse>, Status> {
        let pb::ModelMetadataRequest { name, version } = request.into_inner();
        let model = self.0.models.find(&name, Some(&version))?;
        Ok(Response::new(self.0.models.metadata(model, self.0.delay.is_some()).into()))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        Ok(Response::new(infer(&self.0, request.into_inner()).await?))
    }

    type ModelStreamInferStream =
        Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    /// One answer for each message, in order. A refused message does not end the stream.
    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let server = self.0.clone();
        let answers = request.into_inner().then(move |message| {
            let server = server.clone();
            async move {
                Ok(match infer(&server, message?).await {
                    Ok(response) => ModelStreamInferResponse {
                        error_message: String::new(),
                        infer_response: Some(response),
                    },
                    Err(refusal) => {
                        ModelStreamInferResponse { error_message: refusal.to_string(), infer_response: None }
                    }
                })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}
