use std::borrow::Cow;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::human;

/// How often a line is written where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress bars on the terminal; everything else that is written there goes around them.
#[derive(Debug, Clone)]
pub struct Bars {
    all: MultiProgress,
    visible: bool,
}

impl Bars {
    pub(super) fn new(visible: bool) -> Bars {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Bars { all: MultiProgress::with_draw_target(target), visible }
    }

    /// Runs `write` with the bars taken off the terminal.
    pub fn around<R>(&self, write: impl FnOnce() -> R) -> R {
        if self.visible { self.all.suspend(write) } else { write() }
    }
}

/// How far a long work is: a bar on a terminal, a line every few seconds elsewhere, nothing with `-q`.
///
/// May be used from several threads. Dropped without [`finish`](Progress::finish) it leaves nothing on the terminal.
#[derive(Debug)]
pub struct Progress {
    what: String,
    started: Instant,
    done: AtomicU64,
    /// 0: not known.
    total: AtomicU64,
    show: Show,
}

#[derive(Debug)]
enum Show {
    Nothing,
    Bar(ProgressBar),
    /// When the next line is due, and what is being done.
    Lines(Mutex<(Instant, Cow<'static, str>)>),
}

impl Progress {
    pub(super) fn start(what: &str, total: Option<u64>, bars: &Bars, quiet: bool) -> Progress {
        let started = Instant::now();
        let show = if quiet {
            Show::Nothing
        } else if bars.visible {
            let bar = bars.all.add(ProgressBar::new(0)).with_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            Show::Bar(bar)
        } else {
            Show::Lines(Mutex::new((started + LINE_EVERY, Cow::Borrowed(""))))
        };
        let progress =
            Progress { what: what.to_owned(), started, done: AtomicU64::new(0), total: AtomicU64::new(0), show };
        progress.set_total(total);
        progress
    }

    /// What is to be done in all, in bytes; the server's estimate may grow or shrink on the way.
    pub fn set_total(&self, total: Option<u64>) {
        self.total.store(total.unwrap_or(0), Ordering::Relaxed);
        let Show::Bar(bar) = &self.show else { return };
        match total {
            Some(total) => {
                bar.set_length(total);
                bar.set_style(style(
                    "{prefix} {bar:30} {percent:>3}%  {decimal_bytes} of {decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left  {msg}",
                ));
            }
            None => {
                bar.set_style(style("{prefix} {spinner} {decimal_bytes}  {decimal_bytes_per_sec}  {elapsed}  {msg}"))
            }
        }
    }

    /// `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        self.show(done);
    }

    /// So many bytes are done in all.
    pub fn set(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.show(done);
    }

    /// What is being done just now: `waiting for WAL`.
    pub fn message(&self, text: impl Into<Cow<'static, str>>) {
        let text = text.into();
        match &self.show {
            Show::Nothing => {}
            Show::Bar(bar) => bar.set_message(text),
            // Somebody else is writing a line: the next message is as good.
            Show::Lines(lines) => lines.try_lock().into_iter().for_each(|mut lines| lines.1 = text.clone()),
        }
    }

    /// Takes the bar away; the command's result says the rest. Returns the time that it took.
    pub fn finish(self) -> Duration {
        self.started.elapsed()
    }

    fn show(&self, done: u64) {
        match &self.show {
            Show::Nothing => {}
            Show::Bar(bar) => {
                // More than the estimate is no mistake of the work: the bar stays full.
                let total = self.total.load(Ordering::Relaxed);
                if total != 0 && done > total {
                    bar.set_length(done);
                }
                bar.set_position(done);
            }
            Show::Lines(lines) => {
                let now = Instant::now();
                // Somebody else is writing this very line: leave it to them.
                let Ok(mut lines) = lines.try_lock() else { return };
                let (due, message) = &mut *lines;
                if now >= *due {
                    *due = now + LINE_EVERY;
                    let mut line = self.line(done, now.duration_since(self.started));
                    if !message.is_empty() {
                        line = format!("{line}, {message}");
                    }
                    let _ = writeln!(std::io::stderr(), "{line}"); // nobody may be reading
                }
            }
        }
    }

    fn line(&self, done: u64, elapsed: Duration) -> String {
        let total = self.total.load(Ordering::Relaxed);
        let speed = human::bytes_per_second(done, elapsed);
        if total == 0 {
            return format!("{}: {}, {speed}", self.what, human::bytes(done));
        }
        let percent = u128::from(done.min(total)) * 100 / u128::from(total);
        let left = match done {
            0 => String::new(),
            done => {
                let left = elapsed.as_secs_f64() * (total.saturating_sub(done)) as f64 / done as f64;
                let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
                format!(", {} left", human::duration(Duration::from_secs(left.as_secs())))
            }
        };
        format!("{}: {percent} %, {} of {}, {speed}{left}", self.what, human::bytes(done), human::bytes(total))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are in this file and tested below; the default style is for a mistake in them.
    ProgressStyle::with_template(template)
        .map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("━╸─"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let progress = Progress::start("backup", Some(4_000_000_000), &Bars::new(false), true);
        assert_eq!(
            progress.line(1_000_000_000, Duration::from_secs(10)),
            "backup: 25 %, 1.00 GB of 4.00 GB, 100 MB/s, 30.0 s left"
        );
        assert_eq!(
            progress.line(5_000_000_000, Duration::from_secs(10)),
            "backup: 100 %, 5.00 GB of 4.00 GB, 500 MB/s, 0 ms left"
        );
        progress.set_total(None);
        assert_eq!(progress.line(1_000_000, Duration::from_secs(1)), "backup: 1.00 MB, 1.00 MB/s");
    }
}
