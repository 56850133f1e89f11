//! The webhook's certificate: whoever makes it sends it over a channel, and each handshake is done with the newest.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The certificate in force; `None` while there is none yet, which fails every handshake.
pub type Certificate = watch::Receiver<Option<Arc<CertifiedKey>>>;

/// The names of a Secret of type kubernetes.io/tls, as it is mounted.
const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";
/// How often files are looked at. The kubelet brings a changed Secret within a minute or two; certificates overlap by days.
const LOOK: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Newest(Certificate);

impl ResolvesServerCert for Newest {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().clone()
    }
}

/// TLS 1.2 and 1.3, as API servers speak, without resumption, so that each connection has seen the certificate in force.
pub(super) fn config(certificate: Certificate) -> Result<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Newest(certificate)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A certificate of a chain and its key, PEM.
pub fn of_pem(chain: &[u8], key: &[u8]) -> Result<CertifiedKey> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .context("the certificate is no PEM")?;
    anyhow::ensure!(!chain.is_empty(), "there is no certificate in it");
    // What the key says of itself in an error would end in a log.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| anyhow::anyhow!("the key is no PEM"))?;
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .context("key and certificate do not belong together, or are of a kind that is not served")
}

/// The certificate in a directory, and whatever replaces it there. A pair that cannot be used changes nothing.
///
/// # Errors
///
/// There is none that can be used.
pub fn of_directory(directory: PathBuf, stop: CancellationToken) -> Result<Certificate> {
    looked_at(directory, LOOK, stop)
}

fn looked_at(directory: PathBuf, every: Duration, stop: CancellationToken) -> Result<Certificate> {
    let mut known = files(&directory)?;
    let whole = |files: &Files| of_pem(&files.0, &files.1).map(Arc::new);
    let place = directory.display().to_string();
    let first = whole(&known).with_context(|| format!("{place}/{CHAIN} and {KEY}"))?;
    let (sender, receiver) = watch::channel(Some(first));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sender.closed() => return,
                () = tokio::time::sleep(every) => {}
            }
            // Two files that are written one after the other do not fit for a moment; they are looked at again.
            let Ok(found) = files(&directory) else { continue };
            if found == known {
                continue;
            }
            match whole(&found) {
                Ok(certificate) => {
                    tracing::info!("the webhook's certificate was replaced by that of {place}");
                    sender.send_replace(Some(certificate));
                }
                Err(error) => {
                    tracing::warn!("the webhook's certificate stays: {place}/{CHAIN} and {KEY}: {error:#}");
                }
            }
            known = found;
        }
    });
    Ok(receiver)
}

/// Chain and key.
type Files = (Vec<u8>, Vec<u8>);

fn files(directory: &Path) -> Result<Files> {
    let read = |name: &str| {
        let path = directory.join(name);
        std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))
    };
    Ok((read(CHAIN)?, read(KEY)?))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["a".into()]).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn write(directory: &Path, (chain, key): &(String, String)) {
        std::fs::write(directory.join(CHAIN), chain).unwrap();
        std::fs::write(directory.join(KEY), key).unwrap();
    }

    #[test]
    fn a_pair_has_to_fit() {
        let (one, other) = (pair(), pair());
        assert!(of_pem(one.0.as_bytes(), one.1.as_bytes()).is_ok());
        let told =
            |chain: &str, key: &str| format!("{:#}", of_pem(chain.as_bytes(), key.as_bytes()).unwrap_err());
        assert!(told(&one.0, &other.1).contains("do not belong together"));
        assert!(told("", &one.1).contains("no certificate"));
        assert!(told(&one.0, "").contains("the key is no PEM"));
    }

    #[tokio::test]
    async fn a_directory_is_followed_and_half_of_a_pair_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (every, stop) = (Duration::from_millis(20), CancellationToken::new());
        let told = looked_at(folder.path().to_owned(), every, stop.clone()).unwrap_err();
        assert!(format!("{told:#}").contains("tls.crt cannot be read"), "{told:#}");
        let (old, new) = (pair(), pair());
        write(folder.path(), &old);
        let mut certificate = looked_at(folder.path().to_owned(), every, stop.clone()).unwrap();
        let leaf = |certificate: &Certificate| certificate.borrow().as_ref().unwrap().cert[0].clone();
        let first = leaf(&certificate);
        std::fs::write(folder.path().join(CHAIN), &new.0).unwrap();
        tokio::time::sleep(every * 5).await;
        assert_eq!(leaf(&certificate), first);
        write(folder.path(), &new);
        certificate.changed().await.unwrap();
        assert_ne!(leaf(&certificate), first);
        stop.cancel();
        assert!(certificate.changed().await.is_err());
    }
}
