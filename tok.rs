//! Byte-level BPE tokenizer: train, encode, decode. A Python module named `tok`, built by maturin.
//!
//! A model reads numbers, so text must become numbers. Its bytes would do, at one token a byte. BPE
//! (byte pair encoding, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) makes the sequence
//! about four times shorter by giving frequent strings ids of their own. It starts from the 256
//! bytes, makes a new token of the two neighbours that occur together most often, and repeats. On
//! the text "abab abac":
//!
//! ```text
//! pieces          abab  _abac      a split pattern cuts the text first; no token spans a cut
//! merge 256 = ab  XX    _Xac       (a, b) occurs 3 times, more than any other pair
//! merge 257 = _X  XX    Yac        each pair occurs once now, and the tie goes to the smallest
//!                                  ids: (32, 256), where 32 is the space, written _ here
//! encode "abac"   abac -> Xac -> [256, 97, 99]     the same merges in the order they were learnt
//! ```
//!
//! From Python:
//!
//! ```python
//! from tok import Tokenizer
//! t = Tokenizer.train(texts, 32768, ["<|bos|>"])     # any iterable of str, of any size
//! t.save("out/tokenizer"); t = Tokenizer.load("out/tokenizer")
//! ids = [t.special("<|bos|>")] + t.encode("Hello")   # text never encodes to a special token
//! t.decode(ids)                                      # "<|bos|>Hello"
//! ids, offsets = t.encode_batch(texts)               # for np.frombuffer: uint32, and uint64
//! ```
//!
//! Why Rust: this is the one part of the system whose work is not a matrix product. Training and
//! encoding go over every byte of the text a few times, each time with a branch or a look-up in a
//! table. In Python such a step takes some 50 ns, on one core; compiled, 1 to 5 ns, on all of them.
//! Plain Python versions stand in `test_all.py`, which holds this file to them: 15 lines, but they
//! count every pair anew for each of 32,000 merges, where `learn` below counts only what changed.
//!
//! Left out: normalisation, lower-casing and dropout (the model sees the bytes as written), and
//! special tokens in text (a chat template puts in their ids, so that no user can spell one).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use base64::prelude::{BASE64_STANDARD, Engine};
use fancy_regex::{Regex, RegexBuilder};
use pyo3::exceptions::{PyKeyError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyString};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use regex_syntax::hir::{Class, HirKind};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

/// GPT-4's split pattern, but with digits in groups of one or two: in a vocabulary of 32,768, the
/// thousand numbers of three digits would take too much room.
const PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

const NONE: u32 = u32::MAX; // in place of an id: nothing here
const MAX_VOCAB: usize = 1 << 24; // a damaged file must not make us allocate without bound
const SHORT: usize = 64; // bytes; up to here a scan over an array beats a heap
const MAX_PIECE: usize = 1 << 31; // bytes; a longer piece is cut, as places in it have 32 bits
const BATCH: usize = 16 << 20; // bytes of text that training takes from Python at a time
const WINDOW: usize = 1 << 19; // bytes; fancy-regex gives up on a run of a million characters

fn bad<T>(message: String) -> PyResult<T> {
    Err(PyValueError::new_err(message))
}

// -------------------------------------------------------------------------------------------------
// Splitting: text to pieces

const OTHER: u8 = 0; // what is left: punctuation, symbols, marks, control characters
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 3; // \s without the next two
const NEWLINE: u8 = 4; // [\r\n]
const END: u8 = 5; // past the end of the text

/// The class of each code point, from the regex crate's tables: `char::is_alphabetic` is not \p{L}.
static CLASSES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut classes = vec![OTHER; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
        let parsed = regex_syntax::parse(pattern).expect("a constant pattern");
        if let HirKind::Class(Class::Unicode(set)) = parsed.kind() {
            for range in set.ranges() {
                classes[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
    }
    classes['\r' as usize] = NEWLINE;
    classes['\n' as usize] = NEWLINE;
    classes
});

/// Cuts text into pieces by a pattern: the default one by hand, which is several times as fast,
/// and any other as a regex.
struct Splitter {
    pattern: String,
    regex: Option<Regex>, // None for the default pattern
}

impl Splitter {
    fn new(pattern: &str) -> PyResult<Self> {
        let mut regex = None;
        if pattern != PATTERN {
            let built = RegexBuilder::new(pattern).find_not_empty(true).build();
            regex = Some(built.or_else(|e| bad(format!("pattern {pattern:?}: {e}")))?);
        }
        let pattern = pattern.to_string();
        Ok(Splitter { pattern, regex })
    }

    /// Calls `each` on the pieces of `text` in order. What a pattern skips is a piece too, so that
    /// the pieces, joined, are always the text.
    fn split<'t>(&self, text: &'t str, mut each: impl FnMut(&'t str)) -> PyResult<()> {
        let classes = &CLASSES[..];
        let mut done = 0;
        while done < text.len() {
            let (start, end) = match &self.regex {
                None => (done, piece_end(classes, text, done)),
                Some(regex) => find(regex, text, done)?,
            };
            if start > done {
                each(&text[done..start]);
            }
            if end > start {
                each(&text[start..end]);
            }
            done = end;
        }
        Ok(())
    }
}

/// The first match from byte `at` on, or the empty end of the text.
fn find(regex: &Regex, text: &str, at: usize) -> PyResult<(usize, usize)> {
    let found = regex.find_from_pos(text, at).or_else(|_| {
        // A run too long for the regex's stack is matched in parts.
        let mut end = text.len().min(at + WINDOW);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        regex.find_from_pos(&text[..end], at)
    });
    match found {
        Ok(Some(part)) => Ok((part.start(), part.end())),
        Ok(None) => Ok((text.len(), text.len())),
        Err(e) => bad(format!(
            "the split pattern failed at byte {at} of a text: {e}"
        )),
    }
}

/// Where the piece that starts at byte `at` ends: PATTERN by hand, its alternatives in order.
fn piece_end(classes: &[u8], text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let look = |i: usize| match bytes.get(i) {
        Some(&b) if b < 128 => (classes[b as usize], 1),
        Some(_) => text[i..]
            .chars()
            .next()
            .map_or((END, 0), |c| (classes[c as usize], c.len_utf8())),
        None => (END, 0),
    };
    let run = |mut i: usize, class: u8| {
        loop {
            let (next, width) = look(i);
            if next != class {
                return i;
            }
            i += width;
        }
    };
    let (class, width) = look(at);

    // '(?i:[sdmt]|ll|ve|re), where ignoring case makes the long s (U+017F) an s too
    match bytes[at..] {
        [b'\'', 0xC5, 0xBF, ..] => return at + 3,
        [b'\'', a, ..] if b"sdmtSDMT".contains(&a) => return at + 2,
        [b'\'', a, b, ..] if [*b"ll", *b"ve", *b"re"].contains(&[a | 32, b | 32]) => return at + 3,
        _ => {}
    }
    // [^\r\n\p{L}\p{N}]?+\p{L}+
    if class != NUMBER && class != NEWLINE {
        let start = if class == LETTER { at } else { at + width };
        let end = run(start, LETTER);
        if end > start {
            return end;
        }
    }
    // \p{N}{1,2}
    if class == NUMBER {
        let (next, next_width) = look(at + width);
        return at + width + if next == NUMBER { next_width } else { 0 };
    }
    //  ?[^\s\p{L}\p{N}]++[\r\n]*
    let start = if bytes[at] == b' ' { at + 1 } else { at };
    let end = run(start, OTHER);
    if end > start {
        return run(end, NEWLINE);
    }
    // What is left is white space: up to its last line end, or without its last character, or all.
    let (mut end, mut last, mut line_end) = (at, at, at);
    while let (class @ (SPACE | NEWLINE), width) = look(end) {
        last = end;
        end += width;
        if class == NEWLINE {
            line_end = end;
        }
    }
    if line_end > at {
        line_end // \s*[\r\n]
    } else if end < text.len() && last > at {
        last // \s+(?!\S): the last space goes to the word after it
    } else {
        end // \s+
    }
}

// -------------------------------------------------------------------------------------------------
// Training: text to merges

/// Counts the distinct pieces of `texts`. Memory grows with the pieces, not with the text.
fn count_pieces(texts: &Bound<PyAny>, splitter: &Splitter) -> PyResult<FxHashMap<String, i64>> {
    let py = texts.py();
    let pool = threads(0)?;
    let mut texts = strings(texts)?;
    let mut total: FxHashMap<String, i64> = FxHashMap::default();
    loop {
        // Only one thread can take strings from Python, so take a batch of them ...
        let (mut batch, mut bytes) = (Vec::new(), 0);
        for text in texts.by_ref() {
            let text = text?;
            bytes += text.len();
            batch.push(text);
            if bytes >= BATCH {
                break;
            }
        }
        if batch.is_empty() {
            return Ok(total);
        }
        // ... and count it on all cores, while Python's other threads may run.
        py.detach(|| {
            let counting = batch
                .par_iter()
                .try_fold(FxHashMap::default, |mut counts, text| {
                    splitter.split(text, |piece| *counts.entry(piece).or_insert(0) += 1)?;
                    Ok(counts)
                });
            let parts: PyResult<Vec<FxHashMap<&str, i64>>> = pool.install(|| counting.collect());
            for (piece, count) in parts?.into_iter().flatten() {
                match total.get_mut(piece) {
                    Some(sum) => *sum += count,
                    None => _ = total.insert(piece.to_string(), count),
                }
            }
            PyResult::Ok(())
        })?;
        py.check_signals()?;
    }
}

/// A pair of neighbours: how often it occurs, and at which slots (some may have gone since).
#[derive(Default)]
struct Pair {
    count: i64, // 64 bits: a trillion bytes of text hold pairs more than 2^32 times
    slots: Vec<u32>,
}

/// Learns up to `merges` tokens from pieces and their counts; returns all tokens' bytes by id.
///
/// Each byte of each distinct piece has a slot, and a slot with NONE stands between two pieces. A
/// token has its id in its first and in its last slot; lengths are known, so that both neighbours
/// of a token are one step away:
///
/// ```text
/// slots   NONE h e l l o NONE      merge 256 = he:   NONE 256 256 l l o NONE
///                                  merge 257 = hel:  NONE 257   - 257 l o NONE
/// ```
///
/// A merge takes time for the places where its pair occurs, not for the pieces they are in, and
/// changes the counts of the pairs next to those places, not all counts.
fn learn(pieces: FxHashMap<String, i64>, merges: usize) -> PyResult<Vec<Vec<u8>>> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    let mut slots = vec![NONE];
    let mut piece_of = vec![0]; // slot -> index into counts
    let mut counts = Vec::new();
    for (piece, count) in pieces {
        slots.extend(piece.bytes().map(u32::from));
        slots.push(NONE);
        piece_of.resize(slots.len(), counts.len() as u32);
        counts.push(count);
    }
    if slots.len() >= NONE as usize {
        return bad("the text has over 4 GB of distinct pieces; train on a part of it".into());
    }

    let mut pairs: FxHashMap<(u32, u32), Pair> = FxHashMap::default();
    for i in 1..slots.len() - 1 {
        if slots[i] != NONE && slots[i + 1] != NONE {
            let pair = pairs.entry((slots[i], slots[i + 1])).or_default();
            pair.count += counts[piece_of[i] as usize];
            pair.slots.push(i as u32);
        }
    }
    // Highest count first, ties to the smallest pair. Pairs are put in here when their newer token
    // has been made everywhere. From then on their counts only fall, so that an entry found to be
    // too high can go back with the count of today.
    let entry = |(&pair, known): (&(u32, u32), &Pair)| (known.count, Reverse(pair));
    let mut heap: BinaryHeap<_> = pairs.iter().map(entry).collect();

    while tokens.len() < 256 + merges {
        let Some((count, Reverse((left, right)))) = heap.pop() else {
            break;
        };
        let current = pairs[&(left, right)].count;
        if current < count {
            if current > 0 {
                heap.push((current, Reverse((left, right))));
            }
            continue;
        }
        let new = tokens.len() as u32;
        if new % 16 == 0 {
            Python::attach(|py| py.check_signals())?; // Ctrl-C
        }
        tokens.push([&tokens[left as usize][..], &tokens[right as usize]].concat());
        let len = |id: u32| tokens[id as usize].len();
        let mut fresh = Vec::new(); // the pairs that this merge makes
        // Slots were noted from left to right, so that of "aaa" the first two are merged.
        for slot in pairs.remove(&(left, right)).unwrap_or_default().slots {
            let start = slot as usize;
            let middle = start + len(left);
            if slots[start] != left || slots[middle] != right {
                continue; // an earlier merge took one of the two
            }
            let end = middle + len(right);
            let (before, after) = (slots[start - 1], slots[end]);
            let count = counts[piece_of[start] as usize];
            for lost in [(before, left), (right, after)] {
                if let Some(pair) = pairs.get_mut(&lost) {
                    pair.count -= count;
                }
            }
            let mut gain = |made: (u32, u32), slot: usize| {
                let pair = pairs.entry(made).or_default();
                if pair.slots.is_empty() {
                    fresh.push(made);
                }
                pair.count += count;
                pair.slots.push(slot as u32);
            };
            if before != NONE {
                gain((before, new), start - len(before));
            }
            if after != NONE {
                gain((new, after), start);
            }
            slots[middle] = NONE;
            slots[end - 1] = new;
            slots[start] = new;
        }
        let made = fresh.iter().map(|pair| entry((pair, &pairs[pair])));
        heap.extend(made.filter(|&(count, _)| count > 0)); // the next merge along may undo a pair
    }
    Ok(tokens)
}

// -------------------------------------------------------------------------------------------------
// The tokenizer: encode, decode

/// Byte-level BPE. Make one with `Tokenizer.train` or `Tokenizer.load`.
#[pyclass(frozen, module = "tok")]
struct Tokenizer {
    splitter: Splitter,
    tokens: Vec<Vec<u8>>, // the bytes of each id, a special token's name; empty in a gap
    specials: Vec<(String, u32)>, // in id order
    ids: FxHashMap<Vec<u8>, u32>, // ordinary tokens only, so that no text can reach a special one
    bytes: [u32; 256],    // the id of each single byte
    glued: FxHashMap<(u32, u32), u32>, // each two tokens that make a third
}

impl Tokenizer {
    /// `tokens` has the ordinary ones by id, and empty ones in gaps and where special ones go.
    fn new(
        pattern: &str,
        mut tokens: Vec<Vec<u8>>,
        mut specials: Vec<(String, u32)>,
    ) -> PyResult<Self> {
        let mut ids = FxHashMap::default();
        for (id, token) in (0..).zip(&tokens) {
            if !token.is_empty() {
                ids.insert(token.clone(), id);
            }
        }
        let mut bytes = [NONE; 256];
        for (byte, slot) in (0..).zip(&mut bytes) {
            match ids.get(&[byte][..]) {
                Some(&id) => *slot = id,
                None => return bad(format!("no token is the single byte {byte}")),
            }
        }
        // Ranks made elsewhere do not say which two tokens make a third: all that could, do.
        let mut glued = FxHashMap::default();
        for (token, &id) in &ids {
            for (left, right) in (1..token.len()).map(|cut| token.split_at(cut)) {
                if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                    glued.insert((left, right), id);
                }
            }
        }
        specials.sort_by_key(|&(_, id)| id);
        for (i, (name, id)) in specials.iter().enumerate() {
            let wrong = |what| bad(format!("special token {name:?}, id {id}: {what}"));
            if name.is_empty() || specials[..i].iter().any(|(other, _)| other == name) {
                return wrong("names must be distinct, and not empty");
            }
            match tokens.get_mut(*id as usize) {
                Some(token) if token.is_empty() => *token = name.clone().into_bytes(),
                Some(_) => return wrong("the id is taken"),
                None => return wrong("the id is past the vocabulary"),
            }
        }
        let splitter = Splitter::new(pattern)?;
        Ok(Tokenizer {
            splitter,
            tokens,
            specials,
            ids,
            bytes,
            glued,
        })
    }

    fn encode_text(&self, text: &str) -> PyResult<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        self.splitter.split(text, |piece| {
            let piece = piece.as_bytes();
            match self.ids.get(piece) {
                Some(&id) => ids.push(id), // nine pieces in ten are a token of their own
                None if piece.len() <= SHORT => self.merge_short(piece, &mut ids),
                None => {
                    for part in piece.chunks(MAX_PIECE) {
                        self.merge_long(part, &mut ids);
                    }
                }
            }
        })?;
        Ok(ids)
    }

    /// The id that two tokens make, or NONE. An id is a rank too: the lowest is merged first.
    fn glue(&self, left: u32, right: u32) -> u32 {
        self.glued.get(&(left, right)).copied().unwrap_or(NONE)
    }

    /// Appends the ids of a piece: merges the lowest rank, leftmost first, while there is one.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let begin = out.len();
        let mut n = piece.len();
        out.extend(piece.iter().map(|&b| self.bytes[b as usize]));
        let ids = &mut out[begin..];
        let mut ranks = [NONE; SHORT]; // ranks[i] is what ids[i] and ids[i + 1] make
        for i in 0..n - 1 {
            ranks[i] = self.glue(ids[i], ids[i + 1]);
        }
        loop {
            let mut i = 0; // of the lowest rank, the leftmost of equals
            for other in 1..n {
                if ranks[other] < ranks[i] {
                    i = other;
                }
            }
            if ranks[i] == NONE {
                break;
            }
            ids[i] = ranks[i];
            ids.copy_within(i + 2..n, i + 1);
            ranks.copy_within(i + 1..n, i);
            n -= 1;
            if i + 1 < n {
                ranks[i] = self.glue(ids[i], ids[i + 1]);
            }
            if i > 0 {
                ranks[i - 1] = self.glue(ids[i - 1], ids[i]);
            }
        }
        out.truncate(begin + n);
    }

    /// The same with slots, as in `learn`, and a heap: n log n steps, where the scan takes n * n.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let len = |id: u32| self.tokens[id as usize].len();
        let mut slots = vec![NONE; piece.len() + 2];
        for (slot, &byte) in slots[1..].iter_mut().zip(piece) {
            *slot = self.bytes[byte as usize];
        }
        // ranks[i] is what the token that starts at slot i and the one after it make
        let glued = slots.windows(2).map(|pair| self.glue(pair[0], pair[1]));
        let mut ranks: Vec<u32> = glued.collect();
        let noted = ranks.iter().enumerate().filter(|&(_, &rank)| rank != NONE);
        // The heap takes most of the time; with (rank, slot) in one number, half as much.
        let entry = |rank: u32, slot: usize| Reverse((rank as u64) << 32 | slot as u64);
        let mut heap: BinaryHeap<_> = noted.map(|(slot, &rank)| entry(rank, slot)).collect();
        while let Some(Reverse(top)) = heap.pop() {
            let (new, start) = ((top >> 32) as u32, top as u32 as usize);
            if ranks[start] != new {
                continue; // one of the two has since become part of another
            }
            let middle = start + len(slots[start]);
            let end = middle + len(slots[middle]);
            ranks[middle] = NONE;
            slots[end - 1] = new;
            slots[start] = new;
            let mut note = |slot: usize, rank: u32| {
                ranks[slot] = rank;
                if rank != NONE {
                    heap.push(entry(rank, slot));
                }
            };
            note(start, self.glue(new, slots[end]));
            if slots[start - 1] != NONE {
                let before = slots[start - 1];
                note(start - len(before), self.glue(before, new));
            }
        }
        let mut slot = 1;
        while slots[slot] != NONE {
            out.push(slots[slot]);
            slot += len(slots[slot]);
        }
    }

    fn bytes_of(&self, id: &Bound<PyAny>) -> PyResult<&[u8]> {
        let index = match id.extract::<u32>() {
            Err(e) if !e.is_instance_of::<PyOverflowError>(id.py()) => return Err(e),
            index => index.unwrap_or(NONE) as usize,
        };
        match self.tokens.get(index) {
            Some(token) if !token.is_empty() => Ok(token),
            Some(_) => bad(format!("id {id} is in a gap of the vocabulary")),
            None => bad(format!(
                "id {id} is outside the vocabulary of {} ids",
                self.tokens.len()
            )),
        }
    }
}

#[pymethods]
impl Tokenizer {
    /// Learns a vocabulary of `vocab_size` ids from an iterable of str: the 256 bytes, then merges
    /// (highest count first, ties to the smallest (left id, right id)), then the special tokens.
    /// ValueError if the text has too few pairs for so many merges.
    #[staticmethod]
    #[pyo3(signature = (texts, vocab_size, special_tokens, pattern=PATTERN))]
    fn train(
        texts: &Bound<PyAny>,
        vocab_size: i64,
        special_tokens: Vec<String>,
        pattern: &str,
    ) -> PyResult<Self> {
        let merges = room(vocab_size, &special_tokens)?;
        let pieces = count_pieces(texts, &Splitter::new(pattern)?)?;
        build(texts.py(), pieces, merges, special_tokens, pattern)
    }

    /// Private, for tests: `train` on counted pieces, as if from more text than we could read.
    #[staticmethod]
    fn _train_counts(
        py: Python,
        pieces: FxHashMap<String, i64>,
        vocab_size: i64,
    ) -> PyResult<Self> {
        build(py, pieces, room(vocab_size, &[])?, vec![], PATTERN)
    }

    /// Reads what `save` wrote, or ranks made elsewhere in tiktoken's format. `special_tokens`
    /// renames the stored ones in id order. ValueError says which file and line is wrong.
    #[staticmethod]
    #[pyo3(signature = (dir, special_tokens=None))]
    fn load(dir: PathBuf, special_tokens: Option<Vec<String>>) -> PyResult<Self> {
        let path = dir.join("tokenizer.json");
        let meta: Meta = match serde_json::from_slice(&read(&path)?) {
            Ok(meta) => meta,
            Err(e) => return bad(format!("{}: {e}", path.display())), // it gives line and column
        };
        let size = meta.vocab_size;
        if size > MAX_VOCAB {
            return bad(format!(
                "{}: vocab_size {size} is too large",
                path.display()
            ));
        }
        let mut specials: Vec<(String, u32)> = match meta.special_tokens {
            Specials::Ids(ids) => ids.into_iter().collect(),
            Specials::Names(names) => {
                let first = size.saturating_sub(names.len()) as u32;
                names.into_iter().zip(first..).collect()
            }
        };
        specials.sort_by_key(|&(_, id)| id);
        if let Some(names) = special_tokens {
            if names.len() != specials.len() {
                let (new, old) = (names.len(), specials.len());
                return bad(format!(
                    "special_tokens: {new} names for the {old} in {}",
                    path.display()
                ));
            }
            specials = names
                .into_iter()
                .zip(specials)
                .map(|(name, (_, id))| (name, id))
                .collect();
        }
        let tokens = read_ranks(&dir.join("ranks.tiktoken"), size, meta.ranks)?;
        let made = Tokenizer::new(&meta.pattern, tokens, specials);
        made.map_err(|e| Python::attach(|py| format!("{}: {}", dir.display(), e.value(py))))
            .or_else(bad)
    }

    /// Writes `dir`/ranks.tiktoken and `dir`/tokenizer.json, each whole or not at all.
    fn save(&self, dir: PathBuf) -> PyResult<()> {
        fs::create_dir_all(&dir).map_err(|e| at_path(&dir, e))?;
        let mut ranks: Vec<(u32, &Vec<u8>)> =
            self.ids.iter().map(|(token, &id)| (id, token)).collect();
        ranks.sort();
        let line =
            |(id, token): &(u32, &Vec<u8>)| format!("{} {id}\n", BASE64_STANDARD.encode(token));
        write_whole(
            &dir.join("ranks.tiktoken"),
            &ranks.iter().map(line).collect::<String>(),
        )?;
        let meta = Meta {
            pattern: self.splitter.pattern.clone(),
            vocab_size: self.tokens.len(),
            ranks: Some(ranks.len()),
            special_tokens: Specials::Ids(self.specials.iter().cloned().collect()),
        };
        let meta = serde_json::to_string_pretty(&meta).map_err(io::Error::from)?;
        write_whole(&dir.join("tokenizer.json"), &(meta + "\n"))
    }

    /// The ids of a text. Never those of special tokens, whatever the text spells.
    fn encode(&self, py: Python, text: &str) -> PyResult<Vec<u32>> {
        py.detach(|| self.encode_text(text))
    }

    /// The ids of many texts, by several threads (0: one per core). Two bytearrays: uint32 ids of
    /// all texts, and uint64 offsets, where text i has ids[offsets[i]:offsets[i + 1]].
    #[pyo3(signature = (texts, num_threads=0))]
    fn encode_batch<'py>(
        &self,
        texts: &Bound<'py, PyAny>,
        num_threads: usize,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>)> {
        let py = texts.py();
        let texts = strings(texts)?.collect::<PyResult<Vec<_>>>()?;
        let parts: Vec<Vec<u32>> = py.detach(|| {
            let pool = threads(num_threads.min(texts.len()))?;
            let encoded = texts.par_iter().map(|text| self.encode_text(text));
            pool.install(|| encoded.collect::<PyResult<_>>())
        })?;
        let mut total = 0u64;
        let mut offsets = total.to_ne_bytes().to_vec();
        for part in &parts {
            total += part.len() as u64;
            offsets.extend(total.to_ne_bytes());
        }
        let ids = PyByteArray::new_with(py, 4 * total as usize, |buffer| {
            for (place, id) in buffer.chunks_exact_mut(4).zip(parts.iter().flatten()) {
                place.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((ids, PyByteArray::new(py, &offsets)))
    }

    /// The text of some ids: bytes that are not UTF-8 become U+FFFD, special tokens their names.
    fn decode(&self, ids: &Bound<PyAny>) -> PyResult<String> {
        let mut bytes = Vec::new();
        for id in ids.try_iter()? {
            bytes.extend_from_slice(self.bytes_of(&id?)?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The bytes of one id; of a special token, those of its name.
    fn token_bytes<'py>(&self, id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(id.py(), self.bytes_of(id)?))
    }

    /// The id of a special token, by name.
    fn special(&self, name: &str) -> PyResult<u32> {
        match self.specials.iter().find(|(known, _)| known == name) {
            Some(&(_, id)) => Ok(id),
            None => Err(PyKeyError::new_err(format!(
                "no special token {name}; there are: {}",
                self.special_tokens().join(" ")
            ))),
        }
    }

    /// The pieces of a text: what `encode` works on, one by one. Joined, they are the text.
    fn split<'t>(&self, text: &'t str) -> PyResult<Vec<&'t str>> {
        let mut pieces = Vec::new();
        self.splitter.split(text, |piece| pieces.push(piece))?;
        Ok(pieces)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    #[getter]
    fn pattern(&self) -> &str {
        &self.splitter.pattern
    }

    /// Names in id order.
    #[getter]
    fn special_tokens(&self) -> Vec<&str> {
        self.specials.iter().map(|(name, _)| &name[..]).collect()
    }
}

/// How many merges a vocabulary has room for, beside 256 bytes and the special tokens.
fn room(vocab_size: i64, specials: &[String]) -> PyResult<usize> {
    let least = 256 + specials.len() as i64;
    if vocab_size < least || vocab_size > MAX_VOCAB as i64 {
        return bad(format!(
            "vocab_size is {vocab_size}, but must be from {least} to {MAX_VOCAB}"
        ));
    }
    Ok((vocab_size - least) as usize)
}

/// Learns the merges, and puts the special tokens after them.
fn build(
    py: Python,
    pieces: FxHashMap<String, i64>,
    merges: usize,
    specials: Vec<String>,
    pattern: &str,
) -> PyResult<Tokenizer> {
    let mut tokens = py.detach(|| learn(pieces, merges))?;
    let (first, size) = (tokens.len(), tokens.len() + specials.len());
    if first < 256 + merges {
        let found = first - 256;
        return bad(format!(
            "the text gives only {found} merges, so vocab_size can be {size} at most"
        ));
    }
    tokens.resize(size, Vec::new());
    Tokenizer::new(
        pattern,
        tokens,
        specials.into_iter().zip(first as u32..).collect(),
    )
}

// -------------------------------------------------------------------------------------------------
// Files, threads, and strings from Python

/// A FileNotFoundError, PermissionError and so on that says where.
fn at_path(path: &Path, e: io::Error) -> PyErr {
    io::Error::new(e.kind(), format!("{}: {e}", path.display())).into()
}

fn read(path: &Path) -> PyResult<Vec<u8>> {
    fs::read(path).map_err(|e| at_path(path, e))
}

/// Writes beside the file, then renames: a reader finds the old content or the new, never a part.
fn write_whole(path: &Path, content: &str) -> PyResult<()> {
    let draft = path.with_extension(format!("tmp{}", std::process::id()));
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(content.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().map_err(|e| at_path(path, e))
}

/// What tokenizer.json holds.
#[derive(Serialize, Deserialize)]
struct Meta {
    pattern: String,
    vocab_size: usize,
    ranks: Option<usize>, // lines in ranks.tiktoken, so that a cut file is noticed
    special_tokens: Specials,
}

#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "special_tokens must be {name: id}, or names for the last ids"
)]
enum Specials {
    Ids(BTreeMap<String, u32>),
    Names(Vec<String>),
}

/// ranks.tiktoken: the bytes of each id.
fn read_ranks(path: &Path, size: usize, ranks: Option<usize>) -> PyResult<Vec<Vec<u8>>> {
    let content = read(path)?;
    let mut tokens = vec![Vec::new(); size];
    let mut seen = FxHashMap::default();
    let mut number = 0;
    for line in String::from_utf8_lossy(&content).lines() {
        number += 1;
        let wrong = |what| bad(format!("{}, line {number}: {what}", path.display()));
        let fields = line.split_once(' ').and_then(|(token, rank)| {
            Some((
                BASE64_STANDARD.decode(token).ok()?,
                rank.parse::<usize>().ok()?,
            ))
        });
        match fields {
            Some((token, rank)) if !token.is_empty() => {
                if rank >= size {
                    return wrong(format!("rank {rank} is not below the vocab_size {size}"));
                }
                if !tokens[rank].is_empty() {
                    return wrong(format!("rank {rank} stands on an earlier line too"));
                }
                if let Some(other) = seen.insert(token.clone(), rank) {
                    return wrong(format!("this token has rank {other} already"));
                }
                tokens[rank] = token;
            }
            _ => return wrong("expected a token in base64, a space and its rank".into()),
        }
    }
    match ranks {
        Some(n) if n != number => bad(format!(
            "{}, line {number}: the file ends here, but tokenizer.json says {n} lines",
            path.display()
        )),
        _ => Ok(tokens),
    }
}

/// Threads for one call (0: one per core). Lasting ones would be missing after a fork, and the
/// child would wait for them for ever.
fn threads(n: usize) -> PyResult<ThreadPool> {
    let pool = ThreadPoolBuilder::new().num_threads(n).build();
    pool.map_err(|e| io::Error::other(e).into())
}

/// The items of an iterable of str, without a copy.
fn strings(texts: &Bound<PyAny>) -> PyResult<impl Iterator<Item = PyResult<PyBackedStr>>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts must be several str, not one"));
    }
    Ok(texts.try_iter()?.enumerate().map(|(i, item)| {
        let item = item?;
        match item.cast::<PyString>() {
            Ok(text) => PyBackedStr::try_from(text.clone())
                .or_else(|e| bad(format!("texts: item {i}: {e}"))), // a lone surrogate
            Err(_) => {
                let kind = item.get_type();
                Err(PyTypeError::new_err(format!(
                    "texts: item {i} is {kind}, not a str"
                )))
            }
        }
    }))
}

#[pymodule]
fn tok(module: &Bound<PyModule>) -> PyResult<()> {
    module.add("PATTERN", PATTERN)?;
    module.add_class::<Tokenizer>()
}
