//! `[receive]`: the DICOM receiver; off until it is told where to listen.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{Kind, SettingsError, present, whole};

/// Longest title of an application entity (PS3.5, table 6.2-1).
const MAX_TITLE: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawReceive {
    listen: Option<String>,
    ae_title: String,
    allow: Vec<String>,
    peers: Vec<String>,
    max_associations: u64,
    association_timeout_s: u64,
    idle_timeout_s: u64,
    object_timeout_s: u64,
    tls: Option<RawTls>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    certificate: PathBuf,
    key: PathBuf,
    clients: Option<PathBuf>,
}

/// Who may send images, and how.
#[derive(Clone, Debug)]
pub(crate) struct Receive {
    /// Where senders connect.
    pub(crate) listen: SocketAddr,
    /// This box's title.
    pub(crate) ae_title: String,
    /// Titles of those who may call; never empty.
    pub(crate) allow: Vec<String>,
    /// Addresses that they may call from; any where empty.
    pub(crate) peers: Vec<IpAddr>,
    /// Associations at a time.
    pub(crate) max_associations: usize,
    /// Longest time until an association is agreed upon, and for a response to be sent.
    pub(crate) association_timeout: Duration,
    /// Longest silence between two messages.
    pub(crate) idle_timeout: Duration,
    /// Longest time for one object.
    pub(crate) object_timeout: Duration,
    /// Encryption; without it associations are in the clear.
    pub(crate) tls: Option<ReceiveTls>,
}

/// What associations are encrypted with: files in PEM.
#[derive(Clone, Debug)]
pub(crate) struct ReceiveTls {
    /// This box's certificate, with those that vouch for it.
    pub(crate) certificate: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
    /// Who vouches for senders; any sender is heard where absent.
    pub(crate) clients: Option<PathBuf>,
}

impl RawReceive {
    /// Checks every value, relative paths taken from `base`; `None` where there is no address.
    pub(super) fn checked(self, base: &Path) -> Result<Option<Receive>, SettingsError> {
        let ae_title = title("receive.ae_title", &self.ae_title)?;
        let allow: Vec<String> = self
            .allow
            .iter()
            .map(|allowed| title("receive.allow", allowed))
            .collect::<Result<_, _>>()?;
        let peers: Vec<IpAddr> = self
            .peers
            .iter()
            .map(|peer| address(peer))
            .collect::<Result<_, _>>()?;
        let max_associations = whole("receive.max_associations", self.max_associations, 1, 16)?;
        let seconds = |field, found, high| whole(field, found, 1, high).map(Duration::from_secs);
        let association_timeout = seconds(
            "receive.association_timeout_s",
            self.association_timeout_s,
            120,
        )?;
        let idle_timeout = seconds("receive.idle_timeout_s", self.idle_timeout_s, 3600)?;
        let object_timeout = seconds("receive.object_timeout_s", self.object_timeout_s, 600)?;
        let file = |field, path: PathBuf| present(field, base.join(path), Kind::File);
        let tls = match self.tls {
            None => None,
            Some(tls) => Some(ReceiveTls {
                certificate: file("receive.tls.certificate", tls.certificate)?,
                key: file("receive.tls.key", tls.key)?,
                clients: tls
                    .clients
                    .map(|clients| file("receive.tls.clients", clients))
                    .transpose()?,
            }),
        };
        let Some(listen) = self.listen else {
            return Ok(None);
        };
        let listen = listen.parse().map_err(|_| SettingsError::Range {
            field: "receive.listen",
            found: listen.clone(),
            expected: "an address and port such as 127.0.0.1:11112".into(),
        })?;
        if allow.is_empty() {
            return Err(SettingsError::Range {
                field: "receive.allow",
                found: "[]".into(),
                expected: "one title or more, of those who may send".into(),
            });
        }
        Ok(Some(Receive {
            listen,
            ae_title,
            allow,
            peers,
            max_associations: usize::try_from(max_associations).unwrap_or(1),
            association_timeout,
            idle_timeout,
            object_timeout,
            tls,
        }))
    }
}

/// A title as it goes over the wire, without the spaces around it.
fn title(field: &'static str, found: &str) -> Result<String, SettingsError> {
    let trimmed = found.trim_matches(' ');
    let plain = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b'\\';
    if trimmed.is_empty() || trimmed.len() > MAX_TITLE || !trimmed.bytes().all(plain) {
        return Err(SettingsError::Range {
            field,
            found: format!("{found:?}"),
            expected: format!("1..={MAX_TITLE} letters, digits and signs without backslash"),
        });
    }
    Ok(trimmed.into())
}

fn address(found: &str) -> Result<IpAddr, SettingsError> {
    let address: IpAddr = found.parse().map_err(|_| SettingsError::Range {
        field: "receive.peers",
        found: found.into(),
        expected: "addresses such as 192.168.2.1".into(),
    })?;
    Ok(address.to_canonical())
}
