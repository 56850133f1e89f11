//! Before a subject is timed: does it answer, was it the upstream that answered, and does it turn away whoever
//! has no certificate?

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::guarded_protocol;
use super::hosts::{Host, Hosts};
use crate::case::{Case, Shape};
use crate::certificates;
use crate::load::{self, Protocol, h1, h2};
use crate::subject::{Running, Subject};
use crate::upstream::Addresses;

/// How long a subject may take until it answers.
const START: Duration = Duration::from_secs(15);
const AGAIN: Duration = Duration::from_millis(50);
/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(2);

/// What is checked against what.
pub(super) struct Check<'a> {
    pub(super) case: &'a Case,
    pub(super) subject: Subject,
    pub(super) upstream: Addresses,
    pub(super) answer: &'a str,
    pub(super) certificates: &'a Path,
    /// Where the client and the upstream are, if not here.
    pub(super) hosts: Option<&'a Hosts>,
}

impl Check<'_> {
    /// Waits until the subject answers, and fails unless it does so rightly.
    pub(super) async fn run(&self, running: &mut Running) -> Result<()> {
        let before = self.seen().await?;
        let tls = match self.case.shape {
            Shape::Tls => Some(self.client(Some("client"), self.case.client)?),
            _ => None,
        };
        let deadline = Instant::now() + START;
        let body = loop {
            running.check()?;
            let answer = {
                let _away = self.hosts.map(|hosts| hosts.enter(Host::Client)).transpose()?;
                ask(running.front, self.case.client, tls.as_ref()).await
            };
            let why = match answer {
                Ok((200, body)) => break body,
                Ok((status, _)) => format!("it answers with status {status}"),
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                return Err(running.story(&format!("gave no 200 within {START:?} ({why})")));
            }
            tokio::time::sleep(AGAIN).await;
        };
        ensure!(body == self.answer.as_bytes(), "the answer is not the upstream's, so it was never asked");
        ensure!(self.seen().await? > before, "the upstream did not see the request");
        match running.guarded {
            Some(address) => self.refuses(address).await,
            None => Ok(()),
        }
    }

    /// The listener must give a 200 neither in TLS without a certificate nor in plaintext.
    async fn refuses(&self, address: SocketAddr) -> Result<()> {
        let _away = self.hosts.map(|hosts| hosts.enter(Host::Server)).transpose()?;
        let protocol = guarded_protocol(self.case, self.subject);
        let stranger = self.client(None, protocol)?;
        let name = self.subject.name();
        let answer = ask(address, protocol, Some(&stranger)).await;
        ensure!(!matches!(answer, Ok((200, _))), "{name} serves a client that shows no certificate");
        let answer = ask(address, protocol, None).await;
        ensure!(
            !matches!(answer, Ok((200, _))),
            "{name} serves plaintext where it should ask for a certificate"
        );
        Ok(())
    }

    fn client(&self, leaf: Option<&str>, protocol: Protocol) -> Result<TlsConnector> {
        certificates::connector(self.certificates, leaf, protocol.alpn())
    }

    /// How many requests the upstream has seen.
    pub(super) async fn seen(&self) -> Result<u64> {
        let _away = self.hosts.map(|hosts| hosts.enter(Host::Server)).transpose()?;
        let mut connection = h1::Connection::new(load::connect(self.upstream.h1).await?);
        let request = h1::Request::new("/seen", 0);
        let answer = connection.exchange(&request).await.context("the upstream does not answer")?;
        std::str::from_utf8(answer.body)?.parse().context("the upstream's count")
    }
}

/// One request on a connection of its own.
async fn ask(
    address: SocketAddr,
    protocol: Protocol,
    tls: Option<&TlsConnector>,
) -> io::Result<(u16, Vec<u8>)> {
    let ask = async {
        match tls {
            None => exchange(load::connect(address).await?, protocol, false).await,
            Some(tls) => exchange(load::secure(address, tls).await?, protocol, true).await,
        }
    };
    tokio::time::timeout(REQUEST, ask).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn exchange<S>(stream: S, protocol: Protocol, secure: bool) -> io::Result<(u16, Vec<u8>)>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    match protocol {
        Protocol::H1 => {
            let request = h1::Request::new("/", 0);
            let mut connection = h1::Connection::new(stream);
            let answer = connection.exchange(&request).await?;
            Ok((answer.status, answer.body.to_vec()))
        }
        Protocol::H2 => h2::Connection::new(stream, secure).exchange().await,
    }
}
