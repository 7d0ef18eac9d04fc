//! Certificates as `--tls-creds` wants them, made on the spot: one authority, one server, one client.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// The files that `--tls-creds` looks for.
pub const FILES: [&str; 5] = [
    "ca-cert.pem",
    "server-cert.pem",
    "server-key.pem",
    "client-cert.pem",
    "client-key.pem",
];

/// Writes all of [`FILES`] into the new folder `folder`; the server is known as `name`.
pub fn make(folder: &Path, name: &str) -> Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let mut texts = vec![authority.pem()];
    for _ in ["server", "client"] {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![name.to_owned()])?;
        texts.push(params.signed_by(&key, &authority)?.pem());
        texts.push(key.serialize_pem());
    }
    fs::create_dir(folder)?;
    for (file, text) in std::iter::zip(FILES, texts) {
        fs::write(folder.join(file), text)?;
    }
    Ok(())
}
