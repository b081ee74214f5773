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
//! table. In Python such a step takes some 50 ns, on one core; compiled, 1 to 5 ns, on all of them,
//! and what is near in memory can be near: a word is a 16-byte number here (`key`), not an object.
//! Plain Python versions stand in `test_all.py`, which holds this file to them: 15 lines, but they
//! count every pair anew for each of 32,000 merges, where `learn` below counts only what changed.
//!
//! Left out: normalisation, lower-casing and dropout (the model sees the bytes as written), and
//! special tokens in text (a chat template puts in their ids, so that no user can spell one).

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{self, File};
use std::hash::BuildHasher;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use base64::prelude::{BASE64_STANDARD, Engine};
use fancy_regex::{Regex, RegexBuilder};
use pyo3::exceptions::{PyKeyError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyList, PyString};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use regex_syntax::hir::{Class, HirKind};
use rustc_hash::{FxBuildHasher, FxHashMap};
use serde::{Deserialize, Serialize};
use thread_local::ThreadLocal;

/// GPT-4's split pattern, but with digits in groups of one or two: in a vocabulary of 32,768, the
/// thousand numbers of three digits would take too much room.
const PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

const NONE: u32 = u32::MAX; // in place of an id: nothing here
const LONG: u128 = u128::MAX; // in place of a key: the piece has over 15 bytes
const MAX_VOCAB: usize = (1 << 21) - 1; // so that three ids fit into 64 bits
const MAX_PIECE: usize = 1 << 30; // bytes; a longer piece is cut, as places in it have 32 bits
const CACHE: usize = 1 << 17; // pieces whose ids a thread remembers, in 4 MB
const AHEAD: usize = 32; // pieces whose places there are asked for before they are used
const BATCH: usize = 16 << 20; // bytes of text that training takes from Python at a time
const WINDOW: usize = 1 << 19; // bytes; fancy-regex gives up on a run of a million characters

type Tokens = Vec<Vec<u8>>; // the bytes of each id
type Named = Vec<(String, u32)>; // special tokens, in id order

/// A ValueError: Err(bad!("id {id} is in a gap")).
macro_rules! bad {
    ($($message:tt)*) => { PyValueError::new_err(format!($($message)*)) };
}

// -------------------------------------------------------------------------------------------------
// Splitting: text to pieces

const OTHER: u8 = 0; // what is left: punctuation, symbols, marks, control characters
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 3; // \s without the next two
const NEWLINE: u8 = 4; // [\r\n]
const END: u8 = 5; // past the end of the text
const QUOTE: u8 = 6; // for `common_length`: OTHER, but a contraction may begin here
const RARE: u8 = 7; // for `common_length`: all that it leaves to `piece_end`

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

/// What cuts text into pieces: any pattern as a regex, but None for the default one, which is cut
/// by hand, several times as fast.
fn splitter(pattern: &str) -> PyResult<Option<Regex>> {
    if pattern == PATTERN {
        return Ok(None);
    }
    let regex = RegexBuilder::new(pattern).find_not_empty(true).build();
    regex
        .map(Some)
        .map_err(|e| bad!("pattern {pattern:?}: {e}"))
}

/// Calls `each` on the pieces of `text` in order, and on their keys. What a pattern skips is a
/// piece too, so that the pieces, joined, are always the text.
fn split<'t, F>(by: &Option<Regex>, text: &'t str, mut each: F) -> PyResult<()>
where
    F: FnMut(&'t [u8], u128),
{
    let (bytes, classes) = (text.as_bytes(), &CLASSES[..]);
    let mut done = 0;
    while done < bytes.len() {
        let end = match by {
            None => match common_length(sixteen(bytes, done)) {
                0 => piece_end(classes, text, done),
                length => done + length,
            },
            Some(regex) => match find(regex, text, done)? {
                (start, end) if start == done => end,
                (start, _) => start,
            },
        };
        each(&bytes[done..end], key(bytes, done, end));
        done = end;
    }
    Ok(())
}

/// The 16 bytes from `at` on as one number, the first of them lowest; zeros past the end.
fn sixteen(bytes: &[u8], at: usize) -> u128 {
    if let Some(chunk) = bytes[at..].first_chunk() {
        return u128::from_le_bytes(*chunk);
    }
    let mut chunk = [0; 16];
    chunk[..bytes.len() - at].copy_from_slice(&bytes[at..]);
    u128::from_le_bytes(chunk)
}

/// A piece of up to 15 bytes as a number, which is hashed and compared in one step: its bytes, and
/// its length on top. LONG for a longer piece.
fn key(bytes: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    if length > 15 {
        return LONG;
    }
    let mask = u128::MAX >> (128 - 8 * length);
    sixteen(bytes, start) & mask | (length as u128) << 120
}

/// The class of each byte, for `common_length`.
const BYTE_CLASSES: [u8; 256] = {
    let mut classes = [OTHER; 256];
    let mut i = 0;
    while i < 256 {
        classes[i] = match i as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b' ' => SPACE,
            b'\r' | b'\n' => NEWLINE,
            b'\'' => QUOTE,
            0 | b'\t' | 0x0B | 0x0C | 0x80.. => RARE, // 0 is also past the end
            _ => OTHER,
        };
        i += 1;
    }
    classes
};

const WORD: u8 = 3; // instead of a length: up to the first byte that is no letter

/// The length of a piece by the classes of its first three bytes, three bits each, or 0 if one has
/// to look closer.
const LENGTHS: [u8; 512] = {
    let mut lengths = [0; 512];
    let mut i = 0;
    while i < 512 {
        lengths[i] = match ((i >> 6) as u8, (i >> 3 & 7) as u8, (i & 7) as u8) {
            (LETTER, _, _) | (OTHER | SPACE, LETTER, _) => WORD,
            (NUMBER, NUMBER, _) => 2,
            (NUMBER, LETTER | OTHER | QUOTE | SPACE | NEWLINE, _) => 1,
            (OTHER | SPACE, NUMBER, _) | (OTHER, SPACE, _) => 1,
            (OTHER | SPACE, OTHER | QUOTE, LETTER | NUMBER | SPACE) => 2,
            (OTHER, NEWLINE, LETTER | NUMBER | OTHER | QUOTE | SPACE) => 2,
            (SPACE, SPACE, LETTER | NUMBER | OTHER | QUOTE) => 1,
            (NEWLINE, LETTER | NUMBER | OTHER | QUOTE, _) => 1,
            _ => 0,
        };
        i += 1;
    }
    lengths
};

/// The length of the piece that these 16 bytes begin with, if tables and arithmetic tell, as they
/// mostly do, or 0. Loops and branches would cost more: no CPU foresees where a word ends, or what
/// comes next, and a wrong guess costs it the time of some 60 operations.
#[inline(always)]
fn common_length(ahead: u128) -> usize {
    const EACH: u128 = u128::MAX / 255; // 1 in every byte
    let class = |i: usize| BYTE_CLASSES[(ahead >> (8 * i)) as u8 as usize] as usize;
    let length = LENGTHS[class(0) << 6 | class(1) << 3 | class(2)];

    let lower = (ahead | (0x20 * EACH)) & (0x7f * EACH);
    let from_a = lower + (0x80 - b'a' as u128) * EACH; // the top bit of a byte: is it >= a?
    let past_z = lower + (0x7f - b'z' as u128) * EACH;
    let others = !(from_a & !past_z & !ahead) & (0x80 * EACH) & !0xff;
    let after = others & others.wrapping_neg(); // the lowest bit: the byte after the word
    let ends_here = others != 0 && after & ahead == 0; // and not in a longer character
    let word = if ends_here {
        others.trailing_zeros() as usize / 8
    } else {
        0
    };
    if length == WORD {
        word
    } else {
        length as usize
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
    let found = found.map_err(|e| bad!("the split pattern failed at byte {at} of a text: {e}"))?;
    Ok(found.map_or((text.len(), text.len()), |part| (part.start(), part.end())))
}

/// The class of the character at byte `at`, and its width in bytes.
#[inline(never)]
fn look_wide(classes: &[u8], text: &str, at: usize) -> (u8, usize) {
    let next = text[at..].chars().next();
    next.map_or((END, 0), |c| (classes[c as usize], c.len_utf8()))
}

/// Where the piece that starts at byte `at` ends: PATTERN by hand, its alternatives in order.
fn piece_end(classes: &[u8], text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let look = |i: usize| match bytes.get(i) {
        Some(&byte) if byte < 128 => (classes[byte as usize], 1),
        _ => look_wide(classes, text, i),
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

/// How often each distinct piece occurs.
#[derive(Default)]
struct Counts {
    short: FxHashMap<u128, i64>, // by key: half the time of a map by bytes
    long: FxHashMap<Vec<u8>, i64>,
}

impl Counts {
    fn add(&mut self, piece: &[u8], key: u128, count: i64) {
        match key {
            LONG => *self.long.entry(piece.to_vec()).or_default() += count,
            _ => *self.short.entry(key).or_default() += count,
        }
    }

    fn pieces(self) -> impl Iterator<Item = (Vec<u8>, u128, i64)> {
        let bytes = |key: u128| key.to_le_bytes()[..(key >> 120) as usize].to_vec();
        let short = self
            .short
            .into_iter()
            .map(move |(key, count)| (bytes(key), key, count));
        short.chain(
            self.long
                .into_iter()
                .map(|(piece, count)| (piece, LONG, count)),
        )
    }
}

/// Counts the distinct pieces of `texts`. Memory grows with the pieces, not with the text.
fn count_pieces(texts: &Bound<PyAny>, splitter: &Option<Regex>) -> PyResult<Counts> {
    let py = texts.py();
    let pool = threads(0)?;
    let of_threads: ThreadLocal<RefCell<Counts>> = ThreadLocal::new();
    let mut texts = strings(texts)?;
    loop {
        // Only one thread can take strings from Python, so take a batch of them ...
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH {
            let Some(text) = texts.next().transpose()? else {
                break;
            };
            bytes += 64 + text.len(); // an empty one takes room too
            batch.push(text);
        }
        if batch.is_empty() {
            break;
        }
        // ... and count it on all cores, while Python's other threads may run.
        py.detach(|| {
            let count = |text: &PyBackedStr| {
                let mut counts = of_threads.get_or_default().borrow_mut();
                split(splitter, text, |piece, key| counts.add(piece, key, 1))
            };
            pool.install(|| batch.par_iter().try_for_each(count))
        })?;
        py.check_signals()?;
    }
    let mut total = Counts::default();
    for (piece, key, count) in of_threads.into_iter().flat_map(|c| c.into_inner().pieces()) {
        total.add(&piece, key, count);
    }
    Ok(total)
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
fn learn(pieces: Counts, merges: usize, progress: &Option<Py<PyAny>>) -> PyResult<Tokens> {
    let mut tokens: Tokens = (0..=255).map(|byte| vec![byte]).collect();
    let mut slots = vec![NONE];
    let mut piece_of = vec![0]; // slot -> index into counts
    let mut counts = Vec::new();
    for (piece, _, count) in pieces.pieces() {
        slots.extend(piece.into_iter().map(u32::from));
        slots.push(NONE);
        piece_of.resize(slots.len(), counts.len() as u32);
        counts.push(count);
    }
    if slots.len() >= NONE as usize {
        return Err(bad!(
            "the text has over 4 GB of distinct pieces; train on a part of it"
        ));
    }
    let note = |pair: &mut Pair, count: i64, slot: usize| {
        pair.count += count;
        pair.slots.push(slot as u32);
    };
    let mut pairs: FxHashMap<(u32, u32), Pair> = FxHashMap::default();
    for i in 1..slots.len() - 1 {
        if slots[i] != NONE && slots[i + 1] != NONE {
            let pair = pairs.entry((slots[i], slots[i + 1])).or_default();
            note(pair, counts[piece_of[i] as usize], i);
        }
    }
    // Highest count first, ties to the smallest pair. Pairs are put in here when their newer token
    // has been made everywhere. From then on their counts only fall, so that an entry found to be
    // too high can go back with the count of today.
    let entry = |(&pair, known): (&(u32, u32), &Pair)| (known.count, Reverse(pair));
    let mut heap: BinaryHeap<_> = pairs.iter().map(entry).collect();
    // Where the pair that is merged stands, by the token before it and by the one after it.
    let mut before: FxHashMap<u32, Pair> = FxHashMap::default();
    let mut after: FxHashMap<u32, Pair> = FxHashMap::default();
    let mut losses = Vec::new();
    while tokens.len() < 256 + merges {
        let Some((count @ 1.., Reverse((left, right)))) = heap.pop() else {
            break;
        };
        let current = pairs[&(left, right)].count;
        if current < count {
            heap.push((current, Reverse((left, right))));
            continue;
        }
        let new = tokens.len() as u32;
        if new % 64 == 0 {
            Python::attach(|py| {
                py.check_signals()?; // Ctrl-C
                let call = |f: &Py<PyAny>| f.call1(py, (new - 256, merges));
                progress.as_ref().map(call).transpose()
            })?;
        }
        tokens.push([&tokens[left as usize][..], &tokens[right as usize]].concat());
        let len = |id: u32| tokens[id as usize].len();
        // Slots were noted from left to right, so that of "aaa" the first two are merged.
        for slot in pairs.remove(&(left, right)).unwrap_or_default().slots {
            let start = slot as usize;
            let middle = start + len(left);
            if slots[start] != left || slots[middle] != right {
                continue; // an earlier merge took one of the two
            }
            let end = middle + len(right);
            let (previous, next) = (slots[start - 1], slots[end]);
            let count = counts[piece_of[start] as usize];
            if previous != NONE {
                let place = start - len(previous);
                note(before.entry(previous).or_default(), count, place);
            }
            if next != NONE {
                note(after.entry(next).or_default(), count, start);
            }
            slots[middle] = NONE;
            slots[end - 1] = new;
            slots[start] = new;
        }
        // (before, left) has become (before, new) at these places, and (right, after) (new, after).
        let before = before
            .drain()
            .map(|(id, pair)| ((id, left), (id, new), pair));
        let after = after
            .drain()
            .map(|(id, pair)| ((right, id), (new, id), pair));
        for (lost, made, pair) in before.chain(after) {
            losses.push((lost, pair.count));
            heap.push(entry((&made, &pair)));
            pairs.insert(made, pair);
        }
        for (lost, count) in losses.drain(..) {
            // Of "aaa", the second (a, a) is lost, but has been removed already.
            if let Some(pair) = pairs.get_mut(&lost) {
                pair.count -= count;
            }
        }
    }
    Ok(tokens)
}

// -------------------------------------------------------------------------------------------------
// Encoding: pieces to ids

/// Byte-level BPE. Make one with `Tokenizer.train` or `Tokenizer.load`.
#[pyclass(frozen, module = "tok")]
struct Tokenizer {
    #[pyo3(get)]
    pattern: String,
    splitter: Option<Regex>,
    tokens: Tokens, // a special token has its name; empty in a gap
    specials: Named,
    ids: FxHashMap<Vec<u8>, u32>, // ordinary tokens only, so that no text can reach a special one
    bytes: [u32; 256],            // the id of each single byte
    short: FxHashMap<u128, u32>,  // the tokens of up to 15 bytes again, by key
    pairs: Vec<[u32; 256]>,       // what each two bytes make, or NONE: half of all look-ups
    glue: Glue,
    ints: Vec<Py<PyInt>>, // a Python int for each id: making them anew takes most of `encode`
    known: ThreadLocal<RefCell<Known>>,
}

/// What each two tokens make. A hash table with one number an entry, left id, right id and new id
/// in 21 bits each, so that a look-up mostly reads 8 bytes from one place.
struct Glue {
    table: Vec<u64>,
    shift: u32,
}

impl Glue {
    const EMPTY: u64 = u64::MAX;

    fn new(made: &[(u32, u32, u32)]) -> Self {
        let bits = (made.len() + made.len() / 2 + 2)
            .next_power_of_two()
            .trailing_zeros();
        let mut glue = Glue {
            table: vec![Self::EMPTY; 1 << bits],
            shift: 64 - bits,
        };
        for &(left, right, id) in made {
            let (place, pair) = glue.find(left, right);
            glue.table[place] = pair << 21 | id as u64;
        }
        glue
    }

    /// Where a pair stands or belongs: at its hash, or else at the next place that is free.
    fn find(&self, left: u32, right: u32) -> (usize, u64) {
        let pair = (left as u64) << 21 | right as u64;
        let mut place = (pair.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize; // Knuth
        while self.table[place] != Self::EMPTY && self.table[place] >> 21 != pair {
            place = (place + 1) % self.table.len();
        }
        (place, pair)
    }

    /// The id that two tokens make, or NONE. An id is a rank too: the lowest is merged first.
    fn get(&self, left: u32, right: u32) -> u32 {
        if left == NONE || right == NONE {
            return NONE;
        }
        match self.table[self.find(left, right).0] {
            Self::EMPTY => NONE,
            entry => entry as u32 & 0x1f_ffff,
        }
    }
}

/// The ids of pieces that a thread has met, up to four each, so that most cost one look-up. A key
/// has one place, by its hash, where the newest stays.
type Known = Vec<(u128, [u32; 4])>;

/// Asks the memory for an entry. It answers after the time of a hundred operations, but many such
/// questions at once in the time of one.
fn prefetch(_entry: &(u128, [u32; 4])) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>((&raw const *_entry).cast());
    }
}

impl Tokenizer {
    /// `tokens` has the ordinary ones by id, and empty ones in gaps and where special ones go.
    fn new(py: Python, pattern: &str, mut tokens: Tokens, specials: Named) -> PyResult<Self> {
        let ordinary = (0..).zip(&tokens).filter(|(_, token)| !token.is_empty());
        let ids: FxHashMap<_, _> = ordinary.map(|(id, token)| (token.clone(), id)).collect();
        let (mut bytes, mut pairs) = ([NONE; 256], vec![[NONE; 256]; 256]);
        let mut made = Vec::new();
        for (token, &id) in &ids {
            match token[..] {
                [byte] => bytes[byte as usize] = id,
                [a, b] => pairs[a as usize][b as usize] = id,
                _ => {}
            }
            // Ranks made elsewhere do not say which two tokens make a third: all that could, do.
            for (left, right) in (1..token.len()).map(|cut| token.split_at(cut)) {
                if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                    made.push((left, right, id));
                }
            }
        }
        if let Some(byte) = bytes.iter().position(|&id| id == NONE) {
            return Err(bad!("no token is the single byte {byte}"));
        }
        for (i, (name, id)) in specials.iter().enumerate() {
            let wrong = |what| Err(bad!("special token {name:?}, id {id}: {what}"));
            if name.is_empty() || specials[..i].iter().any(|(other, _)| other == name) {
                return wrong("names must be distinct, and not empty");
            }
            match tokens.get_mut(*id as usize) {
                Some(token) if token.is_empty() => *token = name.clone().into_bytes(),
                Some(_) => return wrong("the id is taken"),
                None => return wrong("the id is past the vocabulary"),
            }
        }
        let ints = (0..tokens.len()).map(|id| Ok(id.into_pyobject(py)?.unbind()));
        let ints = ints.collect::<PyResult<_>>()?;
        let (pattern, splitter) = (pattern.to_string(), splitter(pattern)?);
        let keys = ids
            .iter()
            .map(|(token, &id)| (key(token, 0, token.len()), id));
        let short = keys.filter(|&(key, _)| key != LONG).collect();
        let (glue, known) = (Glue::new(&made), ThreadLocal::new());
        Ok(Tokenizer {
            pattern,
            splitter,
            tokens,
            specials,
            ids,
            bytes,
            short,
            pairs,
            glue,
            ints,
            known,
        })
    }

    fn encode_text(&self, text: &str) -> PyResult<Vec<u32>> {
        let fresh = || RefCell::new(vec![(0, [0; 4]); CACHE]);
        let mut known = self.known.get_or(fresh).borrow_mut();
        let mut out = Vec::with_capacity(text.len() / 3 + 1);
        let mut batch = Vec::with_capacity(AHEAD);
        split(&self.splitter, text, |piece, key| {
            let place = FxBuildHasher.hash_one(key) as usize % CACHE;
            prefetch(&known[place]);
            batch.push((piece, key, place));
            if batch.len() == AHEAD {
                self.encode_pieces(&batch, &mut known, &mut out);
                batch.clear();
            }
        })?;
        self.encode_pieces(&batch, &mut known, &mut out);
        Ok(out)
    }

    /// Appends the ids of some pieces, given with their keys and their places in `known`.
    fn encode_pieces(&self, batch: &[(&[u8], u128, usize)], known: &mut Known, out: &mut Vec<u32>) {
        for &(piece, key, place) in batch {
            let (holder, ids) = &known[place];
            if *holder == key {
                out.push(ids[0]); // nine pieces in ten are one token
                if ids[1] != NONE {
                    out.extend(ids[1..].iter().take_while(|&&id| id != NONE));
                }
                continue;
            }
            if key == LONG {
                match self.ids.get(piece) {
                    Some(&id) => out.push(id),
                    None => piece
                        .chunks(MAX_PIECE)
                        .for_each(|part| self.merge(part, out)),
                }
                continue;
            }
            let begin = out.len();
            match self.short.get(&key) {
                Some(&id) => out.push(id),
                None => self.merge_short(piece, out),
            }
            let made = &out[begin..];
            if made.len() <= 4 {
                let mut ids = [NONE; 4];
                ids[..made.len()].copy_from_slice(made);
                known[place] = (key, ids);
            }
        }
    }

    /// Appends the ids of a piece of up to 15 bytes: merges the lowest rank, leftmost first, while
    /// there is one.
    fn merge_short(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [NONE; 16];
        let mut ranks = [NONE; 16]; // what each id makes with the next one
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.bytes[byte as usize];
        }
        for (rank, pair) in ranks.iter_mut().zip(piece.windows(2)) {
            *rank = self.pairs[pair[0] as usize][pair[1] as usize];
        }
        let mut n = piece.len();
        loop {
            let (mut i, mut new) = (0, NONE);
            for (j, &rank) in ranks[..n].iter().enumerate() {
                if rank < new {
                    (i, new) = (j, rank);
                }
            }
            if new == NONE {
                break;
            }
            n -= 1;
            ids[i] = new;
            for j in i + 1..n {
                (ids[j], ranks[j]) = (ids[j + 1], ranks[j + 1]);
            }
            (ids[n], ranks[n]) = (NONE, NONE);
            ranks[i] = self.glue.get(new, ids[i + 1]);
            if i > 0 {
                ranks[i - 1] = self.glue.get(ids[i - 1], new);
            }
        }
        out.extend_from_slice(&ids[..n]);
    }

    /// The same for a piece of any length, where moving what follows would take n steps a merge. The
    /// tokens are a linked list instead, each at the place of its first byte:
    ///
    /// ```text
    /// place   0    1 2 3 4 5            merge the two     0    1   3 4 5
    /// ids     NONE a b a c NONE         at 1, ab = 256:   NONE 256 a c NONE
    /// ```
    ///
    /// Above them stands a tournament tree: a leaf is what the token at a place makes with the next
    /// one, any other node the lower of its two children, and the root is the merge to do. A change
    /// climbs one path, so that a piece of n bytes takes n log n steps, even a megabyte of spaces.
    fn merge(&self, piece: &[u8], out: &mut Vec<u32>) {
        let size = (piece.len() + 2).next_power_of_two();
        let entry = |rank: u32, place: usize| (rank as u64) << 32 | place as u64;
        let mut ids = vec![NONE; size];
        let mut next: Vec<u32> = (1..=size as u32).collect();
        let mut previous: Vec<u32> = (0..size as u32).map(|i| i.max(1) - 1).collect();
        let mut tree = vec![u64::MAX; 2 * size];
        for (id, &byte) in ids[1..].iter_mut().zip(piece) {
            *id = self.bytes[byte as usize];
        }
        for (i, pair) in (1..).zip(piece.windows(2)) {
            tree[size + i] = entry(self.pairs[pair[0] as usize][pair[1] as usize], i);
        }
        for node in (1..size).rev() {
            tree[node] = tree[2 * node].min(tree[2 * node + 1]);
        }
        loop {
            let (new, i) = ((tree[1] >> 32) as u32, tree[1] as u32 as usize);
            if new == NONE {
                break;
            }
            let gone = next[i] as usize;
            let (before, after) = (previous[i] as usize, next[gone] as usize);
            ids[i] = new;
            next[i] = after as u32;
            previous[after] = i as u32;
            let with_before = self.glue.get(ids[before], new);
            let with_after = self.glue.get(new, ids[after]);
            for (place, rank) in [(gone, NONE), (before, with_before), (i, with_after)] {
                let mut node = size + place;
                tree[node] = entry(rank, place);
                while node > 1 {
                    node /= 2;
                    let lower = tree[2 * node].min(tree[2 * node + 1]);
                    if tree[node] == lower {
                        break; // and so are all above
                    }
                    tree[node] = lower;
                }
            }
        }
        let mut i = 1;
        while ids[i] != NONE {
            out.push(ids[i]);
            i = next[i] as usize;
        }
    }

    fn bytes_of(&self, id: &Bound<PyAny>) -> PyResult<&[u8]> {
        let index = match id.extract::<u32>() {
            Err(e) if !e.is_instance_of::<PyOverflowError>(id.py()) => return Err(e),
            index => index.unwrap_or(NONE) as usize,
        };
        match self.tokens.get(index) {
            Some(token) if !token.is_empty() => Ok(token),
            Some(_) => Err(bad!("id {id} is in a gap of the vocabulary")),
            None => Err(bad!(
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
    /// ValueError if the text has too few pairs for so many merges. `progress(done, merges)` is
    /// called now and then while these are learnt; before that, `texts` sees how far we are.
    #[staticmethod]
    #[pyo3(signature = (texts, vocab_size, special_tokens, pattern=PATTERN, progress=None))]
    fn train(
        texts: &Bound<PyAny>,
        vocab_size: i64,
        special_tokens: Vec<String>,
        pattern: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let least = 256 + special_tokens.len() as i64;
        if vocab_size < least || vocab_size > MAX_VOCAB as i64 {
            return Err(bad!(
                "vocab_size is {vocab_size}, not from {least} to {MAX_VOCAB}"
            ));
        }
        let pieces = count_pieces(texts, &splitter(pattern)?)?;
        let merges = (vocab_size - least) as usize;
        build(
            texts.py(),
            pieces,
            merges,
            special_tokens,
            pattern,
            progress,
        )
    }

    /// Private, for tests: `train` on counted pieces, as if from more text than we could read.
    #[staticmethod]
    fn _train_counts(py: Python, pieces: BTreeMap<String, i64>, merges: usize) -> PyResult<Self> {
        let mut counts = Counts::default();
        for (piece, count) in &pieces {
            let bytes = piece.as_bytes();
            counts.add(bytes, key(bytes, 0, bytes.len()), *count);
        }
        build(py, counts, merges, vec![], PATTERN, None)
    }

    /// Reads what `save` wrote, or ranks made elsewhere in tiktoken's format. `special_tokens`
    /// renames the stored ones in id order. ValueError says which file and line is wrong.
    #[staticmethod]
    #[pyo3(signature = (dir, special_tokens=None))]
    fn load(py: Python, dir: PathBuf, special_tokens: Option<Vec<String>>) -> PyResult<Self> {
        let path = dir.join("tokenizer.json");
        let content = fs::read(&path).map_err(|e| at_path(&path, e))?;
        let path = path.display();
        let meta: Meta = serde_json::from_slice(&content).map_err(|e| bad!("{path}: {e}"))?;
        let size = meta.vocab_size;
        if size > MAX_VOCAB {
            return Err(bad!("{path}: vocab_size {size} is too large"));
        }
        let mut specials: Named = match meta.special_tokens {
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
                return Err(bad!("special_tokens: {new} names for the {old} in {path}"));
            }
            for ((name, _), new) in specials.iter_mut().zip(names) {
                *name = new;
            }
        }
        let tokens = read_ranks(&dir.join("ranks.tiktoken"), size, meta.ranks)?;
        let made = Tokenizer::new(py, &meta.pattern, tokens, specials);
        made.map_err(|e| bad!("{}: {}", dir.display(), e.value(py)))
    }

    /// Writes `dir`/ranks.tiktoken and `dir`/tokenizer.json, each whole or not at all.
    fn save(&self, dir: PathBuf) -> PyResult<()> {
        fs::create_dir_all(&dir).map_err(|e| at_path(&dir, e))?;
        let mut ranks: Vec<_> = self.ids.iter().map(|(token, &id)| (id, token)).collect();
        ranks.sort();
        let base64 = |token| BASE64_STANDARD.encode(token);
        let lines = ranks
            .iter()
            .map(|&(id, token)| format!("{} {id}\n", base64(token)));
        write_whole(&dir.join("ranks.tiktoken"), &lines.collect::<String>())?;
        let meta = Meta {
            pattern: self.pattern.clone(),
            vocab_size: self.tokens.len(),
            ranks: Some(ranks.len()),
            special_tokens: Specials::Ids(self.specials.iter().cloned().collect()),
        };
        let meta = serde_json::to_string_pretty(&meta).map_err(io::Error::from)?;
        write_whole(&dir.join("tokenizer.json"), &(meta + "\n"))
    }

    /// The ids of a text. Never those of special tokens, whatever the text spells.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let ids = py.detach(|| self.encode_text(text))?;
        PyList::new(py, ids.iter().map(|&id| &self.ints[id as usize]))
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
        let (parts, offsets) = py.detach(|| {
            let pool = threads(num_threads.min(texts.len()))?;
            let encoded = texts.par_iter().map(|text| self.encode_text(text));
            let parts: Vec<Vec<u32>> = pool.install(|| encoded.collect::<PyResult<_>>())?;
            let mut offsets = vec![0; 8];
            let mut total = 0u64;
            for part in &parts {
                total += part.len() as u64;
                offsets.extend(total.to_ne_bytes());
            }
            PyResult::Ok((parts, offsets))
        })?;
        let total: usize = parts.iter().map(Vec::len).sum();
        let ids = PyByteArray::new_with(py, 4 * total, |buffer| {
            let mut rest = buffer;
            for part in &parts {
                let (here, after) = rest.split_at_mut(4 * part.len());
                for (place, id) in here.chunks_exact_mut(4).zip(part) {
                    place.copy_from_slice(&id.to_ne_bytes());
                }
                rest = after;
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
        let found = self.specials.iter().find(|(known, _)| known == name);
        found.map(|&(_, id)| id).ok_or_else(|| {
            let known = self.special_tokens().join(" ");
            PyKeyError::new_err(format!("no special token {name}; there are: {known}"))
        })
    }

    /// The pieces of a text: what `encode` works on, one by one. Joined, they are the text.
    fn split<'t>(&self, text: &'t str) -> PyResult<Vec<&'t str>> {
        let (mut pieces, mut done) = (Vec::new(), 0);
        split(&self.splitter, text, |piece, _| {
            pieces.push(&text[done..done + piece.len()]);
            done += piece.len();
        })?;
        Ok(pieces)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// Names in id order.
    #[getter]
    fn special_tokens(&self) -> Vec<&str> {
        self.specials.iter().map(|(name, _)| &name[..]).collect()
    }
}

/// Learns the merges, and puts the special tokens after them.
fn build(
    py: Python,
    pieces: Counts,
    merges: usize,
    specials: Vec<String>,
    pattern: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<Tokenizer> {
    let mut tokens = py.detach(|| learn(pieces, merges, &progress))?;
    let (first, size) = (tokens.len(), tokens.len() + specials.len());
    if first < 256 + merges {
        let found = first - 256;
        return Err(bad!(
            "the text gives only {found} merges: vocab_size can be {size} at most"
        ));
    }
    tokens.resize(size, Vec::new());
    let specials = specials.into_iter().zip(first as u32..).collect();
    Tokenizer::new(py, pattern, tokens, specials)
}

// -------------------------------------------------------------------------------------------------
// Files, threads, and strings from Python

/// A FileNotFoundError, PermissionError and so on that says where.
fn at_path(path: &Path, e: io::Error) -> PyErr {
    io::Error::new(e.kind(), format!("{}: {e}", path.display())).into()
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
fn read_ranks(path: &Path, size: usize, ranks: Option<usize>) -> PyResult<Tokens> {
    let content = fs::read(path).map_err(|e| at_path(path, e))?;
    let path = path.display();
    let mut tokens = vec![Vec::new(); size];
    let mut seen = FxHashMap::default();
    let mut number = 0;
    for line in String::from_utf8_lossy(&content).lines() {
        number += 1;
        let wrong = |what| Err(bad!("{path}, line {number}: {what}"));
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
        Some(n) if n != number => Err(bad!(
            "{path}, line {number}: the file ends here, but should have {n} lines"
        )),
        _ => Ok(tokens),
    }
}

/// Threads for one call (0: one per core). Lasting ones would be missing after a fork, and the child
/// would wait for them for ever.
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
        let kind = item.get_type();
        let wrong = |_| PyTypeError::new_err(format!("texts: item {i} is {kind}, not a str"));
        let text = item.cast::<PyString>().map_err(wrong)?.clone();
        PyBackedStr::try_from(text).map_err(|e| bad!("texts: item {i}: {e}")) // a lone surrogate
    }))
}

#[pymodule]
fn tok(module: &Bound<PyModule>) -> PyResult<()> {
    module.add("PATTERN", PATTERN)?;
    module.add_class::<Tokenizer>()
}
