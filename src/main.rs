//! Parse, call, exit code: all in [`pgkeep::cli`].

/// Gives what a pack held to the next one, instead of to the system and back: see docs/decisions.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    pgkeep::cli::main(std::env::args_os())
}
