//! Only for how the program is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |name: &str| std::env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    // A hook is started for every segment. At a fixed address 60 000 relocations, and the 260 pages they touch, are done by the
    // linker once instead of at every start: docs/decisions.md.
    if target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo:rustc-link-arg-bin=pgkeep=-no-pie");
    }
}
