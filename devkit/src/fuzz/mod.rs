//! Fuzz harnesses as unit tests.
//!
//! ```text
//!  #[test] fn fuzz_NAME() { devkit::fuzz(file!(), "NAME", |bytes| ..) }
//!       |
//!       +-- cargo test --------> every kept input, and changed copies of them, the same ones in each run
//!       +-- cargo xtask fuzz --> libFuzzer, guided by what an input reaches (feature `libfuzzer`)
//!
//!  __fuzz__/NAME/corpus/    next to the file of the harness: kept inputs
//!  __fuzz__/NAME/crashes/   inputs that have failed
//! ```
//! A run under `cargo test` is short and never fails by chance: it is a test of what is known. The search is the other one.

#[cfg(feature = "libfuzzer")]
#[expect(unsafe_code, reason = "libFuzzer's C interface")]
mod libfuzzer;
mod mutate;

use crate::Random;
use mutate::changed;
use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

/// Changed inputs of one harness under `cargo test`.
const CHANGED: usize = 400;
/// Arguments of libFuzzer, one a line. Set by `cargo xtask fuzz`.
pub const ARGUMENTS: &str = "XTASK_FUZZ_ARGUMENTS";

/// Runs a harness, which panics if an input shows a defect. `file` is `file!()`.
pub fn fuzz(file: &str, name: &str, harness: impl Fn(&[u8]) + 'static) {
    #[cfg(feature = "libfuzzer")]
    if let Ok(arguments) = std::env::var(ARGUMENTS) {
        libfuzzer::run(&arguments, harness);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join(file).with_file_name("__fuzz__").join(name);
    let kept: Vec<(PathBuf, Vec<u8>)> = ["crashes", "corpus"].iter().flat_map(|kind| inputs(&folder.join(kind))).collect();
    assert!(!kept.is_empty(), "{} has no inputs", folder.display());
    for (path, input) in &kept {
        run(&harness, input, &path.display().to_string());
    }
    let mut random = Random(name.bytes().fold(1, |seed, byte| seed << 5 ^ seed >> 3 ^ u64::from(byte)));
    for n in 0..CHANGED {
        let input = changed(&kept, &mut random);
        run(&harness, &input, &format!("changed input {n}"));
    }
}

/// The files of a folder, by name.
fn inputs(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().filter_map(|path| fs::read(&path).ok().map(|input| (path, input))).collect()
}

fn run(harness: &impl Fn(&[u8]), input: &[u8], what: &str) {
    /// Names the input if the harness panics.
    struct Running<'i>(&'i [u8], &'i str);
    impl Drop for Running<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                eprintln!("{}: {}", self.1, self.0.escape_ascii());
            }
        }
    }
    let _running = Running(input, what);
    harness(input);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::RefCell, panic, rc::Rc};

    /// Runs a harness that keeps its inputs.
    fn seen() -> Vec<Vec<u8>> {
        let all = Rc::new(RefCell::new(Vec::new()));
        let to = Rc::clone(&all);
        fuzz(file!(), "devkit", move |input| to.borrow_mut().push(input.to_vec()));
        all.take()
    }

    #[test]
    fn kept_inputs_come_first_and_every_run_has_the_same() {
        let first = seen();
        assert!(first.len() > CHANGED && first == seen());
        assert_eq!(first[..2], [b"a kept input\n".to_vec(), b"{\"another\": 1}\n".to_vec()]);
        let different = first.iter().filter(|input| !first[..2].contains(input)).count();
        assert!(different > CHANGED * 9 / 10, "{different}");
    }

    #[test]
    fn a_harness_that_panics_fails_its_test() {
        let failed = panic::catch_unwind(|| fuzz(file!(), "devkit", |input| assert!(input.len() != 13)));
        assert!(failed.is_err());
    }
}
