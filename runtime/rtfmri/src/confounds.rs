//! Confounds of a run: a table of numbers, one row per volume.
//!
//! Tab-separated, first line the column names, as fMRIPrep and BIDS derivatives write it; every
//! column is used. A missing value (`n/a`) is an error: what it should be is not ours to guess.

use ndarray::Array2;
use thiserror::Error;

use crate::events::{BYTE_ORDER_MARK, cut};

/// Largest file read, bytes: some 10,000 volumes of 50 confounds.
pub const MAX_LEN_BYTES: usize = 16 << 20;

/// Why a confounds file was refused. Lines count from 1, the header included.
#[derive(Debug, Error)]
pub enum ConfoundsError {
    /// The file is larger than any real one.
    #[error("confounds file has {found} bytes, at most {MAX_LEN_BYTES} are read")]
    TooLarge {
        /// Bytes given.
        found: usize,
    },
    /// The first line holds no names.
    #[error("line 1: column names expected, found {found}")]
    Header {
        /// What stands there.
        found: &'static str,
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
    /// A field is not a number.
    #[error("line {line}, column `{column}`: expected a finite number, found `{found}`")]
    Value {
        /// Line in the file.
        line: u64,
        /// Column name, cut to 40 characters.
        column: String,
        /// What stands there, cut to 40 characters.
        found: String,
    },
}

/// Confounds by name.
#[derive(Debug, Clone, PartialEq)]
pub struct Confounds {
    /// The columns' names.
    pub names: Vec<String>,
    /// `[volume, confound]`, as given.
    pub values: Array2<f64>,
}

/// Reads a confounds file.
///
/// # Errors
/// [`ConfoundsError`] naming line and column.
pub fn parse(bytes: &[u8]) -> Result<Confounds, ConfoundsError> {
    if bytes.len() > MAX_LEN_BYTES {
        return Err(ConfoundsError::TooLarge { found: bytes.len() });
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(b'\t')
        .quoting(false)
        .from_reader(bytes);
    let header = reader.headers().map_err(|error| row_error(1, error))?;
    let names: Vec<String> = header.iter().map(|name| name.trim().to_owned()).collect();
    if names.iter().all(String::is_empty) {
        return Err(ConfoundsError::Header { found: "none" });
    }
    if names.iter().all(|name| name.parse::<f64>().is_ok()) {
        return Err(ConfoundsError::Header { found: "numbers" });
    }

    let (mut values, mut rows) = (Vec::new(), 0);
    let mut record = csv::StringRecord::new();
    loop {
        let start = reader.position().line();
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => return Err(row_error(start, error)),
        }
        let line = record.position().map_or(start, csv::Position::line);
        for (name, field) in names.iter().zip(&record) {
            let value = field.trim().parse().ok();
            let value = value.filter(|value: &f64| value.is_finite());
            values.push(value.ok_or_else(|| ConfoundsError::Value {
                line,
                column: cut(name),
                found: cut(field),
            })?);
        }
        rows += 1;
    }
    // Every record has as many fields as the header, or the reader would have said so.
    let values = Array2::from_shape_vec((rows, names.len()), values);
    let values = values.map_err(|_| ConfoundsError::Header { found: "others" })?;
    Ok(Confounds { names, values })
}

fn row_error(start: u64, source: csv::Error) -> ConfoundsError {
    let line = source.position().map_or(start, csv::Position::line);
    ConfoundsError::Row { line, source }
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::{ConfoundsError, MAX_LEN_BYTES, parse};

    #[test]
    fn numbers_are_read_below_their_names() {
        let text = "\u{feff}trans_x\trot_x\r\n0.5\t-1e-3\r\n2\t3\r\n";
        let found = parse(text.as_bytes()).unwrap();
        assert_eq!(found.names, ["trans_x", "rot_x"]);
        assert_eq!(found.values, array![[0.5, -1e-3], [2.0, 3.0]]);
    }

    #[test]
    fn what_is_wrong_is_named_with_line_and_column() {
        for (text, start) in [
            (
                "a\tb\n1\t2\n3\tn/a\n",
                "line 3, column `b`: expected a finite number, found `n/a`",
            ),
            ("a\tb\nNaN\t2\n", "line 2, column `a`"),
            ("a\tb\n1\t\n", "line 2, column `b`"),
            ("a\tb\n1\t2\n1\n", "line 3: not a row"),
            (
                "1.0\t2.0\n3\t4\n",
                "line 1: column names expected, found numbers",
            ),
            ("", "line 1: column names expected, found none"),
        ] {
            let message = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }

    #[test]
    fn file_beyond_the_bound_is_refused() {
        let error = parse(&vec![b'1'; MAX_LEN_BYTES + 1]).unwrap_err();
        assert!(matches!(error, ConfoundsError::TooLarge { .. }));
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read_back(rows in prop::collection::vec(any::<(f64, f64)>(), 0..40)) {
            let rows: Vec<_> = rows.into_iter()
                .filter(|(a, b)| a.is_finite() && b.is_finite())
                .collect();
            let mut text = String::from("a\tb\n");
            for (a, b) in &rows {
                text += &format!("{a:e}\t{b}\n");
            }
            let found = parse(text.as_bytes()).unwrap().values;
            prop_assert_eq!(found.nrows(), rows.len());
            for (row, (a, b)) in found.rows().into_iter().zip(rows) {
                prop_assert_eq!((row[0], row[1]), (a, b));
            }
        }
    }
}
