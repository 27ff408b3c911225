//! Settings of the trigger line: protocols as data, checked once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::port::{Edge, LineSettings, ModemLine, Parity};
use super::protocol::{Frame, Protocol};
use crate::settings::{SettingsError, whole};

/// The protocols that come with the program.
pub(crate) const PROTOCOLS: &str = include_str!("protocols.toml");
/// Longest event of a box.
const MAX_FRAME: u64 = 32;
/// Adapters hold bytes back for up to 16 ms; the bytes of one event may be that far apart, twice.
const ADAPTER_NS: u64 = 32_000_000;

/// `[trigger]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawTrigger {
    device: Option<PathBuf>,
    protocol: Option<String>,
    #[serde(default)]
    protocols: BTreeMap<String, RawProtocol>,
    pulses_per_volume: u64,
    dummy_volumes: Option<u64>,
    baud: Option<u64>,
    data_bits: Option<u64>,
    parity: Option<Parity>,
    stop_bits: Option<u64>,
    codes: Option<Vec<u64>>,
    mask: Option<u64>,
    frame_len: Option<u64>,
    frame_start: Option<u64>,
    code_at: Option<u64>,
    line: Option<ModemLine>,
    edge: Option<Edge>,
    debounce_ms: Option<u64>,
}

/// One box of `[trigger.protocols]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProtocol {
    baud: Option<u64>,
    data_bits: Option<u64>,
    parity: Option<Parity>,
    stop_bits: Option<u64>,
    codes: Option<Vec<u64>>,
    mask: Option<u64>,
    frame_len: Option<u64>,
    frame_start: Option<u64>,
    code_at: Option<u64>,
    line: Option<ModemLine>,
    edge: Option<Edge>,
    debounce_ms: Option<u64>,
}

/// What is listened for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Bytes.
    Bytes(Protocol),
    /// A modem line's edge.
    Edge(ModemLine, Edge),
}

/// The trigger line, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TriggerSettings {
    /// The serial port; a name under `/dev/serial/by-id` outlives unplugging.
    pub(crate) device: PathBuf,
    /// Its rate and format.
    pub(crate) line: LineSettings,
    /// What is a pulse.
    pub(crate) source: Source,
    /// A pulse this soon after another is the same one, nanoseconds.
    pub(crate) debounce_ns: u64,
    /// Pulses per volume, for the run's clock.
    pub(crate) pulses_per_volume: u32,
    /// Discarded volumes that have pulses; found out where it is not set.
    pub(crate) dummy_volumes: Option<u32>,
}

fn wrong(
    field: &'static str,
    found: impl Into<String>,
    expected: impl Into<String>,
) -> SettingsError {
    SettingsError::Range {
        field,
        found: found.into(),
        expected: expected.into(),
    }
}

/// A whole number in a range, as the type it fits.
fn number<T: TryFrom<u64>>(
    field: &'static str,
    found: u64,
    low: u64,
    high: u64,
) -> Result<T, SettingsError> {
    let checked = whole(field, found, low, high)?;
    T::try_from(checked).map_err(|_| wrong(field, found.to_string(), format!("{low}..={high}")))
}

fn optional<T: TryFrom<u64>>(
    field: &'static str,
    found: Option<u64>,
    low: u64,
    high: u64,
) -> Result<Option<T>, SettingsError> {
    found
        .map(|found| number(field, found, low, high))
        .transpose()
}

impl RawTrigger {
    /// Checks every range, of every protocol in the table; `None` where there is no trigger line.
    ///
    /// # Errors
    /// [`SettingsError::Range`].
    pub(crate) fn checked(self, base: &Path) -> Result<Option<TriggerSettings>, SettingsError> {
        for protocol in self.protocols.values() {
            protocol.checked()?;
        }
        let named = match &self.protocol {
            None => RawProtocol::default(),
            Some(name) => self.protocols.get(name).cloned().ok_or_else(|| {
                let known: Vec<&str> = self.protocols.keys().map(String::as_str).collect();
                wrong("trigger.protocol", name.as_str(), known.join(", "))
            })?,
        };
        let inline_codes = self.codes.is_some();
        let merged = RawProtocol {
            baud: self.baud.or(named.baud),
            data_bits: self.data_bits.or(named.data_bits),
            parity: self.parity.or(named.parity),
            stop_bits: self.stop_bits.or(named.stop_bits),
            codes: self.codes.or(named.codes),
            mask: self.mask.or(named.mask),
            frame_len: self.frame_len.or(named.frame_len),
            frame_start: self.frame_start.or(named.frame_start),
            code_at: self.code_at.or(named.code_at),
            // Codes of one's own replace a named protocol's line.
            line: self.line.or(named.line.filter(|_| !inline_codes)),
            edge: self.edge.or(named.edge.filter(|_| !inline_codes)),
            debounce_ms: self.debounce_ms.or(named.debounce_ms),
        };
        let pulses_per_volume =
            number("trigger.pulses_per_volume", self.pulses_per_volume, 1, 512)?;
        let dummy_volumes = optional("trigger.dummy_volumes", self.dummy_volumes, 0, 100)?;
        let Some(device) = self.device else {
            return Ok(None);
        };
        let (line, source, debounce_ns) = merged.checked()?;
        Ok(Some(TriggerSettings {
            device: base.join(device),
            line,
            source,
            debounce_ns,
            pulses_per_volume,
            dummy_volumes,
        }))
    }
}

impl RawProtocol {
    fn checked(&self) -> Result<(LineSettings, Source, u64), SettingsError> {
        let line = LineSettings {
            baud: number("trigger.baud", self.baud.unwrap_or(115_200), 300, 4_000_000)?,
            data_bits: number("trigger.data_bits", self.data_bits.unwrap_or(8), 7, 8)?,
            parity: self.parity.unwrap_or(Parity::None),
            stop_bits: number("trigger.stop_bits", self.stop_bits.unwrap_or(1), 1, 2)?,
        };
        let debounce_ms: u64 = number(
            "trigger.debounce_ms",
            self.debounce_ms.unwrap_or(10),
            0,
            4000,
        )?;
        let source = match (self.line, &self.codes) {
            (Some(modem), None) => Source::Edge(modem, self.edge.unwrap_or(Edge::Rising)),
            (None, Some(codes)) => Source::Bytes(self.protocol(codes, line)?),
            (None, None) => {
                return Err(wrong(
                    "trigger.codes",
                    "nothing",
                    "trigger.protocol, or the bytes that mean a pulse, or trigger.line",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(wrong("trigger.line", "a line and codes", "one of the two"));
            }
        };
        Ok((line, source, debounce_ms * 1_000_000))
    }

    fn protocol(&self, codes: &[u64], line: LineSettings) -> Result<Protocol, SettingsError> {
        let mask: u8 = number("trigger.mask", self.mask.unwrap_or(255), 0, 255)?;
        if codes.is_empty() {
            return Err(wrong("trigger.codes", "[]", "at least one byte"));
        }
        let mut bytes = Vec::new();
        for &code in codes {
            let byte: u8 = number("trigger.codes", code, 0, 255)?;
            if byte & !mask != 0 {
                return Err(wrong(
                    "trigger.codes",
                    code.to_string(),
                    format!("a byte that trigger.mask = {mask} leaves as it is"),
                ));
            }
            bytes.push(byte);
        }
        let len: u8 = number(
            "trigger.frame_len",
            self.frame_len.unwrap_or(1),
            1,
            MAX_FRAME,
        )?;
        let frame = if len == 1 {
            if self.frame_start.is_some() || self.code_at.is_some() {
                return Err(wrong(
                    "trigger.frame_len",
                    "1 with frame_start or code_at",
                    format!("2..={MAX_FRAME}, the bytes of an event"),
                ));
            }
            None
        } else {
            let start = optional("trigger.frame_start", self.frame_start, 0, 255)?;
            let code_at = optional("trigger.code_at", self.code_at, 1, u64::from(len) - 1)?;
            let (Some(start), Some(code_at)) = (start, code_at) else {
                return Err(wrong(
                    "trigger.frame_start",
                    "no frame_start or no code_at",
                    "both, where an event has several bytes",
                ));
            };
            // Eleven bits per byte, twice over.
            let bits = 22 * u64::from(len);
            Some(Frame {
                start,
                len,
                code_at,
                gap_ns: bits * 1_000_000_000 / u64::from(line.baud) + ADAPTER_NS,
            })
        };
        Ok(Protocol::new(&bytes, mask, frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::{Config, File, FileFormat};

    fn checked(text: &str) -> Result<Option<TriggerSettings>, String> {
        #[derive(Deserialize)]
        struct Whole {
            trigger: RawTrigger,
        }
        let text = format!("[trigger]\n{text}");
        let raw: Whole = Config::builder()
            .add_source(File::from_str(
                "[trigger]\npulses_per_volume = 1",
                FileFormat::Toml,
            ))
            .add_source(File::from_str(PROTOCOLS, FileFormat::Toml))
            .add_source(File::from_str(&text, FileFormat::Toml))
            .build()
            .and_then(Config::try_deserialize)
            .map_err(|error| error.to_string())?;
        raw.trigger
            .checked(Path::new("/site"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn without_a_device_there_is_no_line() {
        assert_eq!(checked("protocol = \"arduino-5\""), Ok(None));
    }

    #[test]
    fn every_protocol_of_the_table_is_usable() {
        let names: Vec<String> = PROTOCOLS
            .lines()
            .filter_map(|line| line.strip_prefix("[trigger.protocols."))
            .map(|rest| rest.trim_end_matches(']').to_owned())
            .collect();
        assert!(names.len() >= 8);
        for name in names {
            let settings = checked(&format!("device = \"/dev/ttyS0\"\nprotocol = \"{name}\""));
            assert!(matches!(settings, Ok(Some(_))), "{name}: {settings:?}");
        }
    }

    #[test]
    fn keys_beside_the_name_replace_the_protocols_own() {
        let settings = checked(
            "device = \"tty\"\nprotocol = \"current-designs-5\"\nbaud = 57600\ncodes = [116]\n\
             debounce_ms = 0",
        )
        .unwrap()
        .unwrap();
        assert_eq!(settings.line.baud, 57_600);
        assert_eq!(settings.device, Path::new("/site/tty"));
        assert_eq!(settings.debounce_ns, 0);
        assert_eq!(
            settings.source,
            Source::Bytes(Protocol::new(&[116], 255, None))
        );
    }

    #[test]
    fn a_box_of_ones_own_is_named_like_the_others() {
        let settings = checked(
            "device = \"tty\"\nprotocol = \"ours\"\n[trigger.protocols.ours]\nbaud = 9600\n\
             codes = [1, 2]\nmask = 3",
        );
        assert!(matches!(settings, Ok(Some(_))), "{settings:?}");
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_expected() {
        for (text, says) in [
            ("protocol = \"toaster\"", "cedrus-lumina-xid"),
            ("", "trigger.codes = nothing"),
            ("codes = [256]", "trigger.codes = 256 is outside 0..=255"),
            ("codes = []", "at least one byte"),
            (
                "codes = [53]\nbaud = 10",
                "trigger.baud = 10 is outside 300..=4000000",
            ),
            ("codes = [53]\nmask = 3", "trigger.mask = 3"),
            ("codes = [53]\nframe_len = 6", "frame_start"),
            (
                "codes = [53]\nframe_len = 6\nframe_start = 1\ncode_at = 6",
                "trigger.code_at = 6 is outside 1..=5",
            ),
            ("codes = [53]\ncode_at = 1", "trigger.frame_len"),
            ("codes = [53]\nline = \"dcd\"", "one of the two"),
            ("codes = [53]\ndebounce_ms = 5000", "trigger.debounce_ms"),
            ("codes = [53]\nbauds = 9600", "bauds"),
            ("codes = [53]\nparity = \"maybe\"", "maybe"),
            ("line = \"dtr\"", "dtr"),
            (
                "codes = [53]\npulses_per_volume = 0",
                "trigger.pulses_per_volume",
            ),
            ("codes = [53]\n[trigger.protocols.x]\ncodez = [1]", "codez"),
            (
                "codes = [53]\n[trigger.protocols.x]\nbaud = 9600",
                "trigger.codes",
            ),
        ] {
            let error = checked(&format!("device = \"/dev/ttyS0\"\n{text}")).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }
}
