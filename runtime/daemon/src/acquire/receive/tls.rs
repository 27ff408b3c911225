//! Encrypted associations (PS3.15, annex B): the certificate this box shows, and whose it believes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::settings::ReceiveTls;

/// Why encryption cannot be offered. No message holds what is in a key's file.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum TlsError {
    /// A file that is no PEM of the kind it should be.
    #[error("{field} = {path}: {reason}")]
    File {
        /// The setting.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key do not belong together, or are too weak.
    #[error("receive.tls.certificate and receive.tls.key cannot be used together")]
    Pair(#[source] rustls::Error),
}

/// What associations are encrypted with; TLS 1.2 and 1.3.
///
/// # Errors
/// [`TlsError`] names the setting.
pub(super) fn config(settings: &ReceiveTls) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?;
    let builder = match &settings.clients {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let field = "receive.tls.clients";
            let mut roots = RootCertStore::empty();
            for certificate in certificates(field, path)? {
                roots
                    .add(certificate)
                    .map_err(|error| wrong(field, path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| wrong(field, path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let chain = certificates("receive.tls.certificate", &settings.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&settings.key).map_err(|_| TlsError::File {
        field: "receive.tls.key",
        path: settings.key.clone(),
        reason: "expected a private key in PEM".into(),
    })?;
    let config = builder
        .with_single_cert(chain, key)
        .map_err(TlsError::Pair)?;
    Ok(Arc::new(config))
}

fn certificates(
    field: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| wrong(field, path, &error))?;
    if found.is_empty() {
        return Err(TlsError::File {
            field,
            path: path.into(),
            reason: "expected certificates in PEM".into(),
        });
    }
    Ok(found)
}

fn wrong(field: &'static str, path: &Path, reason: &dyn std::error::Error) -> TlsError {
    TlsError::File {
        field,
        path: path.into(),
        reason: reason.to_string(),
    }
}
