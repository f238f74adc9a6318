//! The kernel's list of living processes, from the eBPF task iterator: start times to the nanosecond and cgroups by id.

use std::io::Read as _;

use aya::programs::{Iter, ProgramError};
use aya::{Btf, Ebpf};
use sampler_common::ProcessEvent;
use sampler_core::observation::ProcessSeen;
use thiserror::Error;

use super::rings::describe;

/// Bytes per read of the iterator.
const CHUNK_BYTES: usize = 64 << 10;
const PROGRAM: &str = "tasks";

#[derive(Debug, Error)]
pub enum TasksError {
    #[error("the eBPF program `{PROGRAM}` is missing")]
    Missing,
    #[error("cannot use the task iterator")]
    Program(#[from] ProgramError),
    #[error("cannot open the task iterator")]
    Link(#[from] aya::programs::links::LinkError),
    #[error("cannot read the task iterator")]
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
    Ok(bytes.chunks_exact(size_of::<ProcessEvent>()).filter_map(|record| describe(record, v1_hierarchy)).collect())
}
