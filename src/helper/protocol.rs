//! What a hook and a helper say to each other, as pure text.
//!
//! ```text
//! hook:    pgkeep 1 <fingerprint> <request>\n
//! helper:  .                                   still working, about once a second
//!          = <code> <length>\n<text>           the answer, and what is to be said on stderr
//!          ?                                   not for me: do it yourself
//! ```

/// A request has one line of at most so many bytes.
pub const MAX_REQUEST: usize = 4096;
/// The text of an answer has at most so many bytes; more is cut.
pub const MAX_TEXT: usize = 64 << 10;

const GREETING: &str = "pgkeep 1 ";
const FINGERPRINT: usize = 64;
/// `= 255 65536\n`, with room.
const MAX_HEAD: usize = 32;

/// What a helper answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What it means is for the caller to say.
    pub code: u8,
    /// For stderr: what happened meanwhile.
    pub text: String,
}

/// A request as bytes; `None` for one that cannot be said in a line.
pub(super) fn write_request(fingerprint: &str, request: &str) -> Option<String> {
    let fits = request.len() <= MAX_REQUEST && !request.contains(['\n', '\0']);
    fits.then(|| format!("{GREETING}{fingerprint} {request}\n"))
}

/// The longest request with everything around it.
pub(super) const MAX_LINE: usize = GREETING.len() + FINGERPRINT + 1 + MAX_REQUEST + 1;

/// Fingerprint and request of a line without its end.
pub(super) fn read_request(line: &str) -> Option<(&str, &str)> {
    let (fingerprint, request) = line.strip_prefix(GREETING)?.split_once(' ')?;
    (fingerprint.len() == FINGERPRINT).then_some((fingerprint, request))
}

pub(super) const BEAT: &[u8] = b".";
pub(super) const NOT_FOR_ME: &[u8] = b"?";

impl Answer {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut end = self.text.len().min(MAX_TEXT);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let text = self.text.get(..end).unwrap_or_default();
        format!("= {} {}\n{text}", self.code, text.len()).into_bytes()
    }
}

/// What was heard so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Not all of it.
    Part,
    Answer(Answer),
    NotForMe,
    /// No helper of ours speaks like that.
    Nonsense,
}

/// Reads what a helper has said so far.
pub(super) fn read_answer(said: &[u8]) -> Heard {
    let after_beats = said.iter().position(|byte| *byte != b'.').and_then(|at| said.get(at..));
    match after_beats {
        None => Heard::Part,
        Some(b"?") => Heard::NotForMe,
        Some([b'=', rest @ ..]) => read_whole(rest),
        Some(_) => Heard::Nonsense,
    }
}

fn read_whole(rest: &[u8]) -> Heard {
    let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
        return if rest.len() > MAX_HEAD { Heard::Nonsense } else { Heard::Part };
    };
    let (head, text) = rest.split_at(end);
    let text = text.get(1..).unwrap_or_default();
    let head = std::str::from_utf8(head).ok().and_then(|head| head.strip_prefix(' ')?.split_once(' '));
    let Some((Ok(code), Ok(len))) = head.map(|(code, len)| (code.parse::<u8>(), len.parse::<usize>())) else {
        return Heard::Nonsense;
    };
    if len > MAX_TEXT || text.len() > len {
        return Heard::Nonsense;
    }
    if text.len() < len {
        return Heard::Part;
    }
    match std::str::from_utf8(text) {
        Ok(text) => Heard::Answer(Answer { code, text: text.to_owned() }),
        Err(_) => Heard::Nonsense,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_one_line() {
        let fingerprint = "a".repeat(FINGERPRINT);
        let line = write_request(&fingerprint, "pg_wal/000000010000000000000001").unwrap();
        assert!(line.len() <= MAX_LINE);
        let read = read_request(line.strip_suffix('\n').unwrap());
        assert_eq!(read, Some((fingerprint.as_str(), "pg_wal/000000010000000000000001")));
        assert_eq!(write_request(&fingerprint, "a\nb"), None);
        assert_eq!(write_request(&fingerprint, &"x".repeat(MAX_REQUEST + 1)), None);
        for nonsense in ["", "pgkeep 1", "pgkeep 2 x y", "pgkeep 1 short x", "GET / HTTP/1.1"] {
            assert_eq!(read_request(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn nonsense_is_no_answer() {
        for said in ["!", "..x", "= 0\n", "= 256 0\n", "= 0 -1\n", "=0 0\n", "= 0 1\nab", "= 0 99999999\n", "?x", "\0"]
        {
            assert_eq!(read_answer(said.as_bytes()), Heard::Nonsense, "{said:?}");
        }
        assert_eq!(read_answer(b"...?"), Heard::NotForMe);
        assert_eq!(read_answer(b""), Heard::Part);
        assert_eq!(read_answer(&[b"=".as_slice(), &[b' '; 99]].concat()), Heard::Nonsense);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// A helper that dies in the middle of a sentence has said nothing.
        #[test]
        fn an_answer_is_whole_or_none(code: u8, text in ".{0,80}", beats in 0usize..4) {
            let answer = Answer { code, text };
            let said = [vec![b'.'; beats], answer.to_bytes()].concat();
            for end in 0..said.len() {
                prop_assert_eq!(read_answer(&said[..end]), Heard::Part);
            }
            prop_assert_eq!(read_answer(&said), Heard::Answer(answer));
        }

        #[test]
        fn a_long_text_is_cut_between_letters(extra in 0usize..4) {
            let text = "x".repeat(MAX_TEXT - extra) + "ääää";
            let said = Answer { code: 0, text: text.clone() }.to_bytes();
            let Heard::Answer(heard) = read_answer(&said) else { panic!("no answer") };
            prop_assert!(heard.text.len() <= MAX_TEXT && text.starts_with(&heard.text));
        }
    }
}
