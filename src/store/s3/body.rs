//! The bytes of a request: chunks as they are, without copying them together; and comparing them with what arrives.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ChecksumAlgorithm;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use sha2::{Digest as _, Sha256};

use super::probe::PutChecksum;

/// Most bytes handed to the connection at once: a stalled upload shows within so many.
const FRAME: usize = 256 << 10;

/// Chunks on their way out.
struct Chunks {
    chunks: std::vec::IntoIter<Bytes>,
    now: Bytes,
    left: u64,
}

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        while this.now.is_empty() {
            match this.chunks.next() {
                Some(next) => this.now = next,
                None => return Poll::Ready(None),
            }
        }
        let frame = this.now.split_to(this.now.len().min(FRAME));
        this.left -= frame.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// As the SDK takes it.
pub(super) fn stream(chunks: Vec<Bytes>) -> ByteStream {
    let left: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    if left == 0 {
        return ByteStream::from_static(b""); // a body without frames would be sent without its length
    }
    ByteStream::from_body_1_x(Chunks { chunks: chunks.into_iter(), now: Bytes::new(), left })
}

/// The bytes `from..to` of `chunks`, shared.
pub(super) fn slice(chunks: &[Bytes], from: u64, to: u64) -> Vec<Bytes> {
    let mut slices = Vec::new();
    let mut at = 0;
    for chunk in chunks {
        let end = at + chunk.len() as u64;
        let (first, last) = (from.clamp(at, end) - at, to.clamp(at, end) - at);
        if first < last {
            slices.push(chunk.slice(first as usize..last as usize)); // invariant: both lie within this chunk
        }
        at = end;
    }
    slices
}

/// What a put carries for the server to check, by header.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) crc32c: Option<String>,
    pub(super) sha256: Option<String>,
}

impl Sum {
    /// Its kind, as the server wants to be told: locks demand it.
    pub(super) fn algorithm(&self) -> Option<ChecksumAlgorithm> {
        match (&self.crc32c, &self.sha256) {
            (Some(_), _) => Some(ChecksumAlgorithm::Crc32C),
            (_, Some(_)) => Some(ChecksumAlgorithm::Sha256),
            (None, None) => None,
        }
    }

    /// Of these bytes. SHA-256, which may take a second, on a thread where that hurts nobody.
    pub(super) async fn of(kind: PutChecksum, chunks: &[Bytes]) -> Sum {
        match kind {
            PutChecksum::None => Sum::default(),
            PutChecksum::Crc32c => {
                let crc = chunks.iter().fold(0, |crc, chunk| crc32c::crc32c_append(crc, chunk));
                Sum { crc32c: Some(BASE64.encode(crc.to_be_bytes())), sha256: None }
            }
            PutChecksum::Sha256 => {
                let chunks = chunks.to_vec();
                let hash = move || {
                    let mut hasher = Sha256::new();
                    chunks.iter().for_each(|chunk| hasher.update(chunk));
                    BASE64.encode(hasher.finalize())
                };
                // A runtime that is shutting down runs nothing any more; the request will not be sent either.
                Sum { crc32c: None, sha256: tokio::task::spawn_blocking(hash).await.ok() }
            }
        }
    }
}

/// Compares what arrives, piece by piece, with chunks.
pub(super) struct Comparison<'a> {
    chunks: std::slice::Iter<'a, Bytes>,
    now: &'a [u8],
}

impl<'a> Comparison<'a> {
    pub(super) fn with(chunks: &'a [Bytes]) -> Comparison<'a> {
        Comparison { chunks: chunks.iter(), now: &[] }
    }

    /// Whether `piece` comes next.
    pub(super) fn goes_on_with(&mut self, mut piece: &[u8]) -> bool {
        while !piece.is_empty() {
            while self.now.is_empty() {
                match self.chunks.next() {
                    Some(next) => self.now = next,
                    None => return false,
                }
            }
            let (here, there) = (self.now.split_at_checked(piece.len()), piece.split_at_checked(self.now.len()));
            let equal = match (here, there) {
                (Some((begin, rest)), _) => {
                    let equal = begin == piece;
                    (self.now, piece) = (rest, &[]);
                    equal
                }
                (None, Some((begin, rest))) => {
                    let equal = begin == self.now;
                    (self.now, piece) = (&[], rest);
                    equal
                }
                (None, None) => false,
            };
            if !equal {
                return false;
            }
        }
        true
    }

    /// Whether nothing is missing at the end.
    pub(super) fn ends(&self) -> bool {
        self.now.is_empty() && self.chunks.clone().all(|chunk| chunk.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(bytes: &[u8], at: &[usize]) -> Vec<Bytes> {
        let mut at: Vec<usize> = at.iter().map(|at| at % (bytes.len() + 1)).collect();
        at.sort_unstable();
        at.insert(0, 0);
        at.push(bytes.len());
        at.windows(2).map(|pair| Bytes::copy_from_slice(&bytes[pair[0]..pair[1]])).collect()
    }

    proptest! {
        #[test]
        fn slices_are_the_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200),
            cuts in prop::collection::vec(any::<usize>(), 0..8), from in 0_u64..250, len in 0_u64..250) {
            let chunks = cut(&bytes, &cuts);
            let (first, last) = ((from as usize).min(bytes.len()), ((from + len) as usize).min(bytes.len()));
            prop_assert_eq!(slice(&chunks, from, from + len).concat(), &bytes[first..last]);
        }

        #[test]
        fn comparing_is_comparing(one in prop::collection::vec(0_u8..2, 0..20), other in prop::collection::vec(0_u8..2, 0..20),
            same in any::<bool>(), cuts in prop::collection::vec(any::<usize>(), 0..6),
            other_cuts in prop::collection::vec(any::<usize>(), 0..6)) {
            let other = if same { one.clone() } else { other };
            let chunks = cut(&one, &cuts);
            let mut comparison = Comparison::with(&chunks);
            let equal = cut(&other, &other_cuts).iter().all(|piece| comparison.goes_on_with(piece)) && comparison.ends();
            prop_assert_eq!(equal, one == other);
        }
    }

    #[tokio::test]
    async fn checksums_are_what_everybody_computes() {
        let chunks = cut(b"123456789", &[3, 7]);
        let sum = Sum::of(PutChecksum::Crc32c, &chunks).await;
        assert_eq!(sum.crc32c.as_deref(), Some("4waSgw==")); // the check value of CRC-32C, 0xE3069283
        let sum = Sum::of(PutChecksum::Sha256, &chunks).await;
        assert_eq!(sum.sha256.as_deref(), Some("FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU="));
        assert_eq!(Sum::of(PutChecksum::None, &chunks).await, Sum::default());
    }
}
