//! Tokens of service accounts, as the kubelet projects them into pods: Kubernetes' own TokenReview says who they are.
//!
//! In: a token. Out: its namespace, service account and pod. The API server checks signature, expiry, audience, and that service account
//! and pod are still there, so a certificate is not renewed for who was deleted. Nothing is kept here: a certificate lives for
//! hours, so a review for each costs the API server little.

use std::time::Duration;

use futures_util::future::BoxFuture;
use k8s_openapi::api::authentication::v1 as authentication;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::timeout;

use super::token::{TokenError, TokenReview, Workload};

/// Whom a token has to be meant for; one that was made for the API server, or for another program, proves nothing here.
pub const AUDIENCE: &str = "penstock.io";
/// An API server that has not answered by then is away; the proxy tries again by itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// What the user of a service account is called, before its namespace.
const USER: &str = "system:serviceaccount:";
/// Where the API server names the pod that a token is bound to.
const POD: &str = "authentication.kubernetes.io/pod-name";

/// Asks the API server.
#[derive(Clone)]
pub struct ApiReview {
    client: Client,
}

impl std::fmt::Debug for ApiReview {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiReview")
    }
}

impl ApiReview {
    /// Asks by this client, who may create `tokenreviews`.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    async fn ask(&self, token: &str) -> Result<Workload, TokenError> {
        let api: Api<authentication::TokenReview> = Api::all(self.client.clone());
        let question = authentication::TokenReview {
            spec: authentication::TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..Default::default()
        };
        let params = PostParams::default();
        match timeout(PATIENCE, api.create(&params, &question)).await {
            Ok(Ok(answer)) => workload(answer.status.unwrap_or_default()),
            Ok(Err(error)) => Err(TokenError::Unavailable(format!("the API server says: {error}"))),
            Err(_) => {
                Err(TokenError::Unavailable(format!("the API server has not answered within {PATIENCE:?}")))
            }
        }
    }
}

impl TokenReview for ApiReview {
    fn check<'a>(&'a self, token: &'a str, _now: i64) -> BoxFuture<'a, Result<Workload, TokenError>> {
        Box::pin(self.ask(token))
    }
}

/// Whom the API server's answer speaks of.
fn workload(status: authentication::TokenReviewStatus) -> Result<Workload, TokenError> {
    if status.authenticated != Some(true) {
        let why = status.error.filter(|why| !why.is_empty());
        let why = why.unwrap_or_else(|| {
            "it is expired, of a deleted pod, or of no service account of this cluster".into()
        });
        return Err(TokenError::Refused(why));
    }
    // An API server that does not know of audiences answers without them, and would accept a token that was made for itself.
    if !status.audiences.unwrap_or_default().iter().any(|audience| audience == AUDIENCE) {
        return Err(TokenError::Refused(format!(
            "its audience is not {AUDIENCE}; project it with that audience"
        )));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name.strip_prefix(USER).and_then(|rest| rest.split_once(':'));
    let Some((namespace, account)) = account else {
        return Err(TokenError::Refused(format!("{name:?} is no service account")));
    };
    let pod = user.extra.as_ref().and_then(|extra| extra.get(POD)?.first().cloned());
    Ok(Workload { namespace: namespace.to_owned(), account: account.to_owned(), pod })
}

#[cfg(test)]
mod tests {
    use authentication::{TokenReviewStatus, UserInfo};

    use super::*;

    fn accepted(user: &str, audience: &str) -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![audience.to_owned()]),
            user: Some(UserInfo {
                username: Some(user.to_owned()),
                extra: Some([(POD.to_owned(), vec!["resnet-0".to_owned()])].into()),
                ..Default::default()
            }),
            error: None,
        }
    }

    #[test]
    fn the_account_and_the_pod_of_an_accepted_token_are_taken() {
        let found = workload(accepted("system:serviceaccount:team-a:resnet", AUDIENCE));
        let expected =
            Workload { namespace: "team-a".into(), account: "resnet".into(), pod: Some("resnet-0".into()) };
        assert_eq!(found, Ok(expected));
    }

    #[test]
    fn what_is_not_for_us_or_no_account_is_refused() {
        let refused = |status| workload(status).unwrap_err().to_string();
        assert!(
            refused(accepted("system:serviceaccount:a:b", "https://kubernetes")).contains("its audience")
        );
        assert!(refused(accepted("system:node:node-1", AUDIENCE)).contains("is no service account"));
        assert!(refused(TokenReviewStatus::default()).contains("of a deleted pod"));
        let said = TokenReviewStatus { error: Some("token has expired".into()), ..Default::default() };
        assert!(refused(said).contains("token has expired"));
    }
}
