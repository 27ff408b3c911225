//! The stimulus list of a run: a BIDS `events.tsv`.
//!
//! Tab-separated, first line the column names; `onset` and `duration` in seconds from
//! the first volume, `trial_type` a name. A column `stim_file` is read where there is one: it
//! tells which trials show the same stimulus. Other columns are allowed and not read.
//! Rows may come in any order and are returned by onset, equal onsets in file order:
//! BIDS recommends sorted rows but does not demand them, and the order carries no
//! information that the onset does not. A negative onset (a stimulus before the first
//! volume) is BIDS and is kept.
//! A missing value (`n/a`) in a column we use is an error, never a guess, but in `stim_file`:
//! there it says that the trial shows no file.

use thiserror::Error;

/// Largest file read, bytes: some 20,000 events, a hundred times a long run.
pub const MAX_LEN_BYTES: usize = 1 << 20;

pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One stimulus.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Start, seconds from the first volume of the run.
    pub onset_s: f64,
    /// Length, seconds; 0 is an impulse.
    pub duration_s: f64,
    /// Name of the condition.
    pub trial_type: String,
    /// Name of the stimulus file, where the events name one.
    pub stimulus: Option<String>,
}

impl Event {
    /// An event that names no stimulus file.
    pub fn new(onset_s: f64, duration_s: f64, trial_type: impl Into<String>) -> Self {
        Self {
            onset_s,
            duration_s,
            trial_type: trial_type.into(),
            stimulus: None,
        }
    }

    /// What was shown: trials of the same name repeat one another.
    #[must_use]
    pub fn stimulus_name(&self) -> &str {
        self.stimulus.as_deref().unwrap_or(&self.trial_type)
    }
}

/// Why an events file was refused. Lines count from 1, the header included.
#[derive(Debug, Error)]
pub enum EventsError {
    /// The file is larger than any real one.
    #[error("events file has {found} bytes, at most {MAX_LEN_BYTES} are read")]
    TooLarge {
        /// Bytes given.
        found: usize,
    },
    /// A column we need is not in the header.
    #[error("line 1: column `{column}` expected, found columns {found:?}")]
    MissingColumn {
        /// The column.
        column: &'static str,
        /// The header as read.
        found: Vec<String>,
    },
    /// A column stands twice in the header, so its value is ambiguous.
    #[error("line 1: column `{column}` expected once, found {found} times")]
    RepeatedColumn {
        /// The column.
        column: &'static str,
        /// How often.
        found: usize,
    },
    /// A row cannot be split into fields.
    #[error("line {line}: not a row of tab-separated UTF-8 fields as many as the header names")]
    Row {
        /// Line in the file.
        line: u64,
        /// What the reader said.
        #[source]
        source: csv::Error,
    },
    /// A field is not a number we can use.
    #[error("line {line}, column `{column}`: expected {expected}, found `{found}`")]
    Value {
        /// Line in the file.
        line: u64,
        /// Column name.
        column: &'static str,
        /// What belongs there.
        expected: &'static str,
        /// What stands there, cut to 40 characters.
        found: String,
    },
}

/// Reads an events file.
///
/// Returns the events by onset.
///
/// # Errors
/// [`EventsError`] naming line and column; a header alone is a run without events.
pub fn parse(bytes: &[u8]) -> Result<Vec<Event>, EventsError> {
    if bytes.len() > MAX_LEN_BYTES {
        return Err(EventsError::TooLarge { found: bytes.len() });
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(b'\t')
        .quoting(false)
        .from_reader(bytes);
    let header = reader.headers().map_err(|error| row_error(1, error))?;
    let onset = find_column(header, "onset")?;
    let duration = find_column(header, "duration")?;
    let trial_type = find_column(header, "trial_type")?;
    let stimulus = match find_column(header, "stim_file") {
        Ok(column) => Some(column),
        Err(EventsError::MissingColumn { .. }) => None,
        Err(error) => return Err(error),
    };

    let mut events = Vec::new();
    let mut record = csv::StringRecord::new();
    loop {
        let start = reader.position().line();
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => return Err(row_error(start, error)),
        }
        let line = record.position().map_or(start, csv::Position::line);
        let field = |column: usize| record.get(column).unwrap_or_default().trim();
        let onset_s = number(field(onset), line, "onset", "a finite number of seconds")?;
        let expected = "a finite number of seconds, 0 or more";
        let duration_s = number(field(duration), line, "duration", expected)?;
        let trial_type = field(trial_type);
        let refuse = |column, expected, found| EventsError::Value {
            line,
            column,
            expected,
            found: cut(found),
        };
        if duration_s < 0.0 {
            return Err(refuse("duration", expected, field(duration)));
        }
        if trial_type.is_empty() || trial_type == "n/a" {
            return Err(refuse("trial_type", "a name", trial_type));
        }
        events.push(Event {
            onset_s,
            duration_s,
            trial_type: trial_type.to_owned(),
            stimulus: stimulus
                .map(field)
                .filter(|name| !name.is_empty() && *name != "n/a")
                .map(str::to_owned),
        });
    }
    events.sort_by(|a, b| a.onset_s.total_cmp(&b.onset_s));
    Ok(events)
}

fn find_column(header: &csv::StringRecord, column: &'static str) -> Result<usize, EventsError> {
    let mut places = (0..header.len()).filter(|&i| header.get(i).map(str::trim) == Some(column));
    let first = places.next().ok_or_else(|| EventsError::MissingColumn {
        column,
        found: header.iter().take(20).map(cut).collect(),
    })?;
    match places.count() {
        0 => Ok(first),
        more => Err(EventsError::RepeatedColumn {
            column,
            found: more + 1,
        }),
    }
}

fn number(
    text: &str,
    line: u64,
    column: &'static str,
    expected: &'static str,
) -> Result<f64, EventsError> {
    text.parse()
        .ok()
        .filter(|value: &f64| value.is_finite())
        .ok_or_else(|| EventsError::Value {
            line,
            column,
            expected,
            found: cut(text),
        })
}

fn row_error(start: u64, source: csv::Error) -> EventsError {
    let line = source.position().map_or(start, csv::Position::line);
    EventsError::Row { line, source }
}

/// As much of a text from outside as an error shows.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{EventsError, MAX_LEN_BYTES, parse};

    fn message(text: &str) -> String {
        parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn byte_order_mark_and_carriage_returns_are_read_over() {
        let text = "\u{feff}onset\tduration\ttrial_type\r\n12.0\t3\tface\r\n";
        let events = parse(text.as_bytes()).unwrap();
        assert_eq!(events.len(), 1);
        assert_eq!((events[0].onset_s, events[0].duration_s), (12.0, 3.0));
        assert_eq!(events[0].trial_type, "face");
    }

    #[test]
    fn rows_out_of_order_are_returned_by_onset_and_equal_onsets_in_file_order() {
        let text = "trial_type\textra\tonset\tduration\nb\tx\t2\t1\nc\tx\t1\t1\nd\tx\t2\t0\n";
        let names: Vec<_> = parse(text.as_bytes()).unwrap();
        let names: Vec<_> = names.iter().map(|e| e.trial_type.as_str()).collect();
        assert_eq!(names, ["c", "b", "d"]);
    }

    #[test]
    fn missing_column_names_the_columns_found() {
        let text = message("onset\tlength\ttrial_type\n1\t2\ta\n");
        assert!(
            text.contains("`duration`") && text.contains("length"),
            "{text}"
        );
        assert!(message("").contains("`onset`"));
        assert!(message("onset\tonset\tduration\ttrial_type\n").contains("2 times"));
    }

    #[test]
    fn bad_values_name_line_and_column() {
        let head = "onset\tduration\ttrial_type\n0\t3\ta\n";
        for (row, column, found) in [
            ("NaN\t3\ta", "onset", "NaN"),
            ("inf\t3\ta", "onset", "inf"),
            ("n/a\t3\ta", "onset", "n/a"),
            ("4\t-3\ta", "duration", "-3"),
            ("4\t3\tn/a", "trial_type", "n/a"),
            ("4\t3\t", "trial_type", ""),
        ] {
            let text = message(&format!("{head}{row}\n"));
            let start = format!("line 3, column `{column}`");
            assert!(text.starts_with(&start), "{text}");
            assert!(text.ends_with(&format!("`{found}`")), "{text}");
        }
    }

    #[test]
    fn stimulus_file_names_what_was_shown_where_there_is_one() {
        let text = "stim_file\tonset\tduration\ttrial_type\n\
                    cat.png\t0\t3\timage\nn/a\t4\t3\tblank\n";
        let events = parse(text.as_bytes()).unwrap();
        assert_eq!(events[0].stimulus.as_deref(), Some("cat.png"));
        assert_eq!(events[0].stimulus_name(), "cat.png");
        assert_eq!(events[1].stimulus, None);
        assert_eq!(events[1].stimulus_name(), "blank");
        let twice = message("onset\tduration\ttrial_type\tstim_file\tstim_file\n");
        assert!(twice.contains("`stim_file`"), "{twice}");
    }

    #[test]
    fn short_row_names_its_line() {
        let text = message("onset\tduration\ttrial_type\n0\t3\ta\n4\t3\n");
        assert!(text.starts_with("line 3:"), "{text}");
    }

    #[test]
    fn file_beyond_the_bound_is_refused() {
        let error = parse(&vec![b'\t'; MAX_LEN_BYTES + 1]).unwrap_err();
        assert!(matches!(error, EventsError::TooLarge { .. }));
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(rows in prop::collection::vec((0_f64..1e4, 0_f64..30.0), 0..40)) {
            let mut text = String::from("onset\tduration\ttrial_type\n");
            for (i, (onset, duration)) in rows.iter().enumerate() {
                text += &format!("{onset}\t{duration}\tt{i}\n");
            }
            let events = parse(text.as_bytes()).unwrap();
            prop_assert_eq!(events.len(), rows.len());
            for event in events {
                let row: usize = event.trial_type[1..].parse().unwrap();
                prop_assert_eq!((event.onset_s, event.duration_s), rows[row]);
            }
        }
    }
}
