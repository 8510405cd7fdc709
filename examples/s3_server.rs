//! The S3 server of the tests as a process of its own, for benchmarks: `cargo run --release --example s3_server`.
//! Objects lie in memory. It prints how it is reached, and for every line on its standard input how many requests of each
//! kind there were so far; it ends when its input does.

#[path = "../tests/support/s3/mod.rs"]
mod s3;

use std::io::{BufRead, Write};

fn main() -> std::io::Result<()> {
    let server = s3::TestS3::start(s3::TestS3Options::default());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} {} {} {}", server.endpoint(), server.bucket(), server.access_key(), server.secret_key())?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let counts = server.requests().into_iter().map(|(kind, count)| format!("{kind}={count}"));
        writeln!(out, "{}", counts.collect::<Vec<_>>().join(" "))?;
        out.flush()?;
    }
    Ok(())
}
