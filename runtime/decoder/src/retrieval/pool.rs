//! A pool on the box: the file is mapped, nothing of it is copied.

use std::fs::File;
use std::path::Path;
use std::thread;

use bundle::{Bundle, StageName};
use half::f16;
use memmap2::{Advice, Mmap};
use sha2::{Digest, Sha256};

use super::PoolError;
use super::layout::{self, Header, Sections, field, hex, place};
use super::sketch::{Projection, dot, dot_half};

/// Threads that look at a pool.
const THREADS: usize = 2;
/// Values that are compared exactly without asking the sketches: 256 MiB, some 40 ms.
const EXACT_VALUES: u64 = 1 << 27;
/// Values of the candidates that the sketches leave for exact comparison, and fewest candidates.
const CANDIDATE_VALUES: usize = 1 << 25;
const MIN_CANDIDATES: usize = 64;

/// Which image encoder embedded a pool: SHA-256 of its graph's and its weights' hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderDigest(pub [u8; 32]);

impl EncoderDigest {
    /// Of a bundle's image encoder; `None` where it has none.
    #[must_use]
    pub fn of(bundle: &Bundle) -> Option<EncoderDigest> {
        let manifest = bundle.manifest();
        let stage = manifest.stages.get(&StageName::ImageEncoder)?;
        let mut hasher = Sha256::new();
        for path in [Some(&stage.graph), stage.weights.as_ref()]
            .into_iter()
            .flatten()
        {
            hasher.update(&manifest.files.get(path)?.sha256);
            hasher.update("\n");
        }
        Some(EncoderDigest(hasher.finalize().into()))
    }
}

/// A picture found in a pool.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Place in the pool.
    pub index: usize,
    /// Cosine of the flattened tokens, -1..=1.
    pub cosine: f32,
    /// Whether the cosine is that of all tokens, or estimated from sketches.
    pub exact: bool,
}

/// An open pool of candidate pictures.
#[derive(Debug)]
pub struct Pool {
    map: Mmap,
    header: Header,
    sections: Sections,
    names: Vec<String>,
    projection: Option<Projection>,
}

impl Pool {
    /// Maps a pool and checks header, names and length.
    ///
    /// Flipped bits among the numbers are not noticed here: a bundle's manifest covers them.
    ///
    /// # Errors
    /// [`PoolError`] names the field, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Pool, PoolError> {
        let file = File::open(path).map_err(PoolError::Read)?;
        let found = file.metadata().map_err(PoolError::Read)?;
        if !found.is_file() {
            return Err(field("file", "a plain file", "something else"));
        }
        if found.len() == 0 {
            return Err(field("header", "128 bytes", "an empty file"));
        }
        let map = map(&file)?;
        let (header, sections) = Header::from_bytes(&map)?;
        let names = layout::names(&map[place(&sections.names)], header.count)?;
        // Only a hint: a system that does not take it reads when it is asked.
        let _ = map.advise_range(
            Advice::WillNeed,
            place(&sections.table).start,
            place(&(sections.table.start..sections.sketches.end)).len(),
        );
        let values = place(&(0..header.values())).end;
        let projection = (header.sketch_len > 0)
            .then(|| Projection::new(values, header.sketch_len as usize, header.seed));
        Ok(Pool {
            map,
            header,
            sections,
            names,
            projection,
        })
    }

    /// Pictures in the pool; at least one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// The name of a picture, as its file was called below the folder.
    #[must_use]
    pub fn name(&self, index: usize) -> Option<&str> {
        self.names.get(index).map(String::as_str)
    }

    /// Tokens of an embedding and values of a token.
    #[must_use]
    pub fn embedding(&self) -> [u32; 2] {
        [self.header.tokens, self.header.dim]
    }

    /// Whether all tokens of all pictures are there, so that cosines are exact.
    #[must_use]
    pub fn keeps_tokens(&self) -> bool {
        self.header.exact
    }

    /// Which image encoder embedded the pictures.
    #[must_use]
    pub fn encoder(&self) -> EncoderDigest {
        EncoderDigest(self.header.encoder)
    }

    /// Refuses a pool that another image encoder embedded; a bundle without one cannot tell.
    ///
    /// # Errors
    /// [`PoolError::Field`] with both digests.
    pub fn check_encoder(&self, bundle: &Bundle) -> Result<(), PoolError> {
        match EncoderDigest::of(bundle) {
            Some(expected) if expected != self.encoder() => Err(field(
                "image encoder",
                hex(&expected.0),
                hex(&self.header.encoder),
            )),
            _ => Ok(()),
        }
    }

    /// The `count` pictures that resemble an embedding most, most similar first; of equals the first.
    ///
    /// Where the pool keeps its tokens, small pools are compared whole; in large ones the sketches
    /// choose the candidates whose tokens are compared. Without tokens, the sketches' estimate is all.
    ///
    /// - `embedding`: `[token * dim]`, row-major.
    ///
    /// # Errors
    /// [`PoolError::Field`] for another length, or values that are no numbers.
    pub fn top(&self, embedding: &[f32], count: usize) -> Result<Vec<Hit>, PoolError> {
        let [tokens, dim] = self.embedding();
        if embedding.len() as u64 != self.header.values() {
            return Err(field(
                "embedding",
                format!("{tokens} x {dim} values"),
                embedding.len().to_string(),
            ));
        }
        if let Some(bad) = embedding.iter().position(|value| !value.is_finite()) {
            return Err(field(
                format!("embedding value {bad}"),
                "a finite number",
                embedding[bad].to_string(),
            ));
        }
        let norm = dot(embedding, embedding).sqrt();
        let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        let all = (0..self.count()).collect::<Vec<_>>();
        let Some(projection) = &self.projection else {
            return Ok(best(self.exact(embedding, inverse, &all), count));
        };
        if self.header.exact && self.header.count * self.header.values() <= EXACT_VALUES {
            return Ok(best(self.exact(embedding, inverse, &all), count));
        }
        let estimates = self.estimate(projection, embedding, inverse);
        if !self.header.exact {
            return Ok(best(estimates, count));
        }
        let candidates = (CANDIDATE_VALUES / embedding.len())
            .max(MIN_CANDIDATES)
            .max(count.saturating_mul(4));
        let chosen: Vec<usize> = best(estimates, candidates)
            .iter()
            .map(|hit| hit.index)
            .collect();
        Ok(best(self.exact(embedding, inverse, &chosen), count))
    }

    /// Cosines of all tokens.
    fn exact(&self, embedding: &[f32], inverse: f64, rows: &[usize]) -> Vec<Hit> {
        let (tokens, table) = (self.halves(&self.sections.tokens), self.table());
        let len = embedding.len();
        in_parallel(rows, |index| {
            let row = &tokens[index * len..(index + 1) * len];
            let cosine = dot_half(row, embedding) * inverse * f64::from(table[index][0]);
            hit(index, cosine, true)
        })
    }

    /// Cosines as the sketches have them: `cos(a, b) = rest(a)·rest(b) + a·c + b·c - c·c` for unit
    /// `a` and `b`, where only the first term is estimated.
    fn estimate(&self, projection: &Projection, embedding: &[f32], inverse: f64) -> Vec<Hit> {
        let centre: &[f32] = self.cast(&self.sections.centre);
        let (sketches, table) = (self.halves(&self.sections.sketches), self.table());
        let query = projection.apply(embedding, super::narrow(inverse), centre);
        let shared = dot(embedding, centre) * inverse - dot(centre, centre);
        let len = query.len();
        let all: Vec<usize> = (0..self.count()).collect();
        in_parallel(&all, |index| {
            let row = &sketches[index * len..(index + 1) * len];
            let [_, along] = table[index];
            let cosine = dot_half(row, &query) + shared + f64::from(along);
            hit(index, cosine, false)
        })
    }

    fn table(&self) -> &[[f32; 2]] {
        self.cast(&self.sections.table)
    }

    fn halves(&self, section: &std::ops::Range<u64>) -> &[f16] {
        self.cast(section)
    }

    /// A section as numbers. Opening found the section in the file, and sections begin on pages, so
    /// nothing but a bug here makes this empty.
    fn cast<T: bytemuck::AnyBitPattern>(&self, section: &std::ops::Range<u64>) -> &[T] {
        bytemuck::try_cast_slice(&self.map[place(section)]).unwrap_or_default()
    }
}

/// Maps a file for reading.
#[expect(
    unsafe_code,
    reason = "no mapping is safe by type: another process may change the file. A pool lies in a verified \
              bundle, which is written once, and its writer puts a finished file in place by renaming, \
              so a mapped file keeps its length (a shorter one would end the process by SIGBUS); \
              changed numbers would change similarities, which any bit pattern is safe for. A copy of \
              the sketches alone would take 205 MB at 100,000 pictures"
)]
fn map(file: &File) -> Result<Mmap, PoolError> {
    // SAFETY: the map is read-only and is read as bytes, f16 and f32, for which every pattern is valid;
    // that the file keeps its length is argued above.
    unsafe { Mmap::map(file) }.map_err(PoolError::Read)
}

fn hit(index: usize, cosine: f64, exact: bool) -> Hit {
    // Rounding may pass 1; numbers of a damaged file may be anything and resemble nothing.
    let cosine = if cosine.is_finite() {
        super::narrow(cosine.clamp(-1.0, 1.0))
    } else {
        -1.0
    };
    Hit {
        index,
        cosine,
        exact,
    }
}

fn in_parallel(rows: &[usize], compare: impl Fn(usize) -> Hit + Sync) -> Vec<Hit> {
    let share = rows.len().div_ceil(THREADS).max(1);
    let compare = &compare;
    thread::scope(|scope| {
        let parts: Vec<_> = rows
            .chunks(share)
            .map(|rows| {
                scope.spawn(move || rows.iter().map(|&row| compare(row)).collect::<Vec<_>>())
            })
            .collect();
        parts
            .into_iter()
            .flat_map(|part| {
                part.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

/// The `count` best, best first.
fn best(mut hits: Vec<Hit>, count: usize) -> Vec<Hit> {
    let order = |a: &Hit, b: &Hit| b.cosine.total_cmp(&a.cosine).then(a.index.cmp(&b.index));
    if count < hits.len() {
        hits.select_nth_unstable_by(count, order);
        hits.truncate(count);
    }
    hits.sort_unstable_by(order);
    hits
}
