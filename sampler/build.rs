//! Takes the kernel object that `cargo xtask build` leaves in `target/ebpf-object/`, or the one `GPU_SAMPLER_EBPF_OBJECT` names.
//! Without it the crate still builds (editors, clippy, unit tests); `run` and `doctor` then say so.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    const VAR: &str = "GPU_SAMPLER_EBPF_OBJECT";
    println!("cargo::rerun-if-env-changed={VAR}");
    println!("cargo::rustc-check-cfg=cfg(ebpf_object)");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("sampler-ebpf.o");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf-object");
    let (object, required) = match env::var_os(VAR) {
        Some(path) => (PathBuf::from(path), true),
        None => (folder.join("sampler-ebpf.o"), false),
    };
    // The folder is watched, not the file: a watched file that does not exist would rebuild the crate every time.
    if let Err(error) = fs::create_dir_all(&folder) {
        println!("cargo::warning={}: {error}", folder.display());
    }
    println!("cargo::rerun-if-changed={}", folder.display());
    match fs::copy(&object, &out) {
        Ok(_) => println!("cargo::rustc-cfg=ebpf_object"),
        Err(error) if required => println!("cargo::error={VAR}={}: {error}", object.display()),
        Err(_) => println!("cargo::warning=built without the kernel program; `cargo xtask build` makes one"),
    }
}
