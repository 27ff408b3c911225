//! Two spellings of the same keys.

/// Pairs of prefixes: how keys are shown, and how the file spells them.
#[derive(Clone, Debug, Default)]
pub struct Names(Vec<(String, String)>);

impl Names {
    /// Adds a pair.
    pub(super) fn pair(&mut self, shown: String, spelt: String) {
        self.0.push((shown, spelt));
    }

    /// How the file would spell a key; the longest prefix that fits decides.
    #[must_use]
    pub fn spelt(&self, key: &str) -> Option<String> {
        let fits = self
            .0
            .iter()
            .filter_map(|(shown, spelt)| Some((shown.len(), spelt, key.strip_prefix(shown)?)));
        fits.max_by_key(|(len, ..)| *len)
            .map(|(_, spelt, rest)| format!("{spelt}{rest}"))
    }

    /// A key as messages have it: with the file's own spelling where that is another one.
    #[must_use]
    pub fn label(&self, key: &str) -> String {
        self.spelt(key)
            .map_or_else(|| key.to_owned(), |spelt| format!("{spelt} ({key})"))
    }
}
