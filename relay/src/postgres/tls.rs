//! TLS to PostgreSQL with libpq's meaning of `sslmode`: up to `require` encrypts without proof of who answers (but a root
//! certificate that is given or lies at libpq's default place is checked), `verify-ca` checks the chain, `verify-full` the name too.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, SupportedProtocolVersion,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls_settings::{SslMode, TlsSettings};
use crate::error::{Error, Result};

/// The connector for these settings. Files are read now: a missing one is wrong configuration.
pub fn connector(settings: &TlsSettings) -> Result<MakeRustlsConnect> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Verifier {
        trust: trust(settings, &provider)?,
        check_name: settings.mode == SslMode::VerifyFull,
        provider: provider.clone(),
    });
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(settings))
        .map_err(|error| Error::Configuration(format!("TLS: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match (&settings.cert, &settings.key) {
        (Some(cert), Some(key)) => builder
            .with_client_auth_cert(certificates("sslcert", cert)?, private_key(key)?)
            .map_err(|error| Error::Configuration(format!("sslcert and sslkey: {error}")))?,
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(MakeRustlsConnect::new(config))
}

fn versions(settings: &TlsSettings) -> Vec<&'static SupportedProtocolVersion> {
    [(settings.tls13, &TLS13), (settings.tls12, &TLS12)]
        .into_iter()
        .filter_map(|(allowed, version)| allowed.then_some(version))
        .collect()
}

/// What is trusted; `None`: whoever answers.
fn trust(settings: &TlsSettings, provider: &Arc<CryptoProvider>) -> Result<Option<Arc<WebPkiServerVerifier>>> {
    let default_file = std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join(".postgresql/root.crt"))
        .filter(|path| path.exists());
    let must_verify = matches!(settings.mode, SslMode::VerifyCa | SslMode::VerifyFull);
    let certificates = match settings.root_cert.clone().or(default_file) {
        Some(path) if path.as_os_str() == "system" => system_certificates()?,
        Some(path) if must_verify || settings.mode == SslMode::Require => certificates("sslrootcert", &path)?,
        None if must_verify => {
            return Err(Error::Configuration(
                "sslmode=verify-ca and verify-full need sslrootcert: a file, or system".into(),
            ));
        }
        _ => return Ok(None),
    };
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(Error::Configuration("sslrootcert holds no usable certificate".into()));
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .with_crls(revoked(settings.crl.as_deref())?)
        .allow_unknown_revocation_status()
        .build()
        .map(Some)
        .map_err(|error| Error::Configuration(format!("sslrootcert: {error}")))
}

fn system_certificates() -> Result<Vec<CertificateDer<'static>>> {
    let found = rustls_native_certs::load_native_certs().certs;
    if found.is_empty() {
        return Err(Error::Configuration("sslrootcert=system: the system has no trusted certificates".into()));
    }
    Ok(found)
}

fn revoked(path: Option<&Path>) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    CertificateRevocationListDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| Error::Configuration(format!("sslcrl: {error}")))
}

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| Error::Configuration(format!("{key}: {error}")))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| Error::Configuration(format!("sslkey: {error}")))
}

#[derive(Debug)]
struct Verifier {
    trust: Option<Arc<WebPkiServerVerifier>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(trust) = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let judged = trust.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match judged {
            // The chain is judged before the name.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
