//! The kernel's own list of living processes, by the program's task iterator: start times to the nanosecond and places by id.

use std::io::Read as _;

use aya::programs::{Iter, ProgramError};
use aya::{Btf, Ebpf};
use sampler_common::ProcessEvent;
use sampler_core::observation::ProcessSeen;
use thiserror::Error;

use super::rings::{Described, describe};

/// The kernel fills this much at a time.
const CHUNK_BYTES: usize = 64 << 10;
const PROGRAM: &str = "tasks";

#[derive(Debug, Error)]
pub enum TasksError {
    #[error("the program `{PROGRAM}` is missing")]
    Missing,
    #[error("the task iterator cannot be used")]
    Program(#[from] ProgramError),
    #[error("the task iterator cannot be opened")]
    Link(#[from] aya::programs::links::LinkError),
    #[error("the task iterator cannot be read")]
    Read(#[from] std::io::Error),
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Iter, TasksError> {
    let program = ebpf.program_mut(PROGRAM).ok_or(TasksError::Missing)?;
    Ok(program.try_into()?)
}

pub fn load(ebpf: &mut Ebpf, btf: &Btf) -> Result<(), TasksError> {
    Ok(program(ebpf)?.load("task", btf)?)
}

pub fn read(ebpf: &mut Ebpf, v1_hierarchy: Option<u32>) -> Result<Vec<ProcessSeen>, TasksError> {
    let program = program(ebpf)?;
    let link = program.attach()?;
    let mut file = program.take_link(link)?.into_file()?;
    let mut bytes = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => bytes.extend_from_slice(&chunk[..n]),
        }
    }
    let one = |record: &[u8]| {
        let Described { tgid, start, at, place } = describe(record, v1_hierarchy)?;
        Some(ProcessSeen { tgid, start, coarse_start: false, began: at, place: Some(place) })
    };
    Ok(bytes.chunks_exact(size_of::<ProcessEvent>()).filter_map(one).collect())
}
