//! Field offsets and enum values from the kernel's BTF: std only, no unsafe, every read bounds-checked.
//!
//! Rust has no CO-RE relocations, so user space resolves the offsets and passes them to the program. The format is described in
//! Documentation/bpf/btf.rst of the kernel.

use thiserror::Error;

#[derive(Debug, Error)]
pub enum BtfError {
    #[error("cannot read the kernel's BTF from {} (CONFIG_DEBUG_INFO_BTF)", path.display())]
    Read { path: std::path::PathBuf, source: std::io::Error },
    #[error("the kernel's BTF is malformed: {0}")]
    Malformed(&'static str),
    #[error("the kernel's BTF does not contain `{0}`")]
    Missing(String),
}

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
/// Maximum nesting of anonymous structs.
const MAX_NESTING: u32 = 8;
/// Members that are visited in search of one: a struct may contain itself many times.
const MAX_MEMBERS: u32 = 1 << 16;

pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Byte position of each type id; id 0 is void.
    positions: Vec<u32>,
}

struct Head {
    position: usize,
    name: u32,
    kind: u32,
    vlen: usize,
    bitfields: bool,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    four.try_into().ok().map(u32::from_ne_bytes)
}

impl<'a> Btf<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let header = |at| word(bytes, at).ok_or(BtfError::Malformed("header"));
        if header(0)? & 0xffff != 0xeb9f {
            return Err(BtfError::Malformed("magic or byte order"));
        }
        let start = header(4)? as usize;
        let section = |offset: u32, len: u32| {
            let from = start.checked_add(offset as usize)?;
            bytes.get(from..from.checked_add(len as usize)?)
        };
        let types = section(header(8)?, header(12)?).ok_or(BtfError::Malformed("type section"))?;
        let strings = section(header(16)?, header(20)?).ok_or(BtfError::Malformed("string section"))?;
        let mut positions = vec![u32::MAX];
        let mut position = 0;
        while position < types.len() {
            let info = word(types, position + 4).ok_or(BtfError::Malformed("type"))?;
            let (kind, vlen) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
            positions.push(position as u32);
            position += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => 12 * vlen,
                    6 | 13 => 8 * vlen,
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => return Err(BtfError::Malformed("unknown kind of type")),
                };
        }
        Ok(Self { types, strings, positions })
    }

    /// Compares without a search for the end of the string, which may be far away.
    fn is_named(&self, at: u32, name: &[u8]) -> bool {
        let text = self.strings.get(at as usize..).unwrap_or_default();
        text.strip_prefix(name).is_some_and(|rest| rest.first().is_none_or(|byte| *byte == 0))
    }

    fn head(&self, id: u32) -> Option<Head> {
        let position = *self.positions.get(id as usize)? as usize;
        let info = word(self.types, position.checked_add(4)?)?;
        Some(Head {
            position,
            name: word(self.types, position)?,
            kind: (info >> 24) & 0x1f,
            vlen: (info & 0xffff) as usize,
            bitfields: info >> 31 == 1,
        })
    }

    fn find(&self, kind: u32, name: &str) -> Result<u32, BtfError> {
        (1..self.positions.len() as u32)
            .find(|id| self.head(*id).is_some_and(|h| h.kind == kind && self.is_named(h.name, name.as_bytes())))
            .ok_or_else(|| BtfError::Missing(name.to_owned()))
    }

    fn member(&self, id: u32, name: &[u8], depth: u32, left: &mut u32) -> Option<u32> {
        let head = self.head(id)?;
        if !(head.kind == STRUCT || head.kind == UNION) || depth > MAX_NESTING {
            return None;
        }
        (0..head.vlen).find_map(|i| {
            *left = left.checked_sub(1)?;
            let member = head.position + 12 + 12 * i;
            let (label, of_type, offset) =
                (word(self.types, member)?, word(self.types, member + 4)?, word(self.types, member + 8)?);
            let bits = if head.bitfields { offset & 0xff_ffff } else { offset };
            if self.is_named(label, name) {
                Some(bits / 8)
            } else if self.is_named(label, b"") {
                (bits / 8).checked_add(self.member(of_type, name, depth + 1, left)?)
            } else {
                None
            }
        })
    }

    /// Byte offset of a member, including members of anonymous structs and unions.
    pub fn offset(&self, structure: &str, member: &str) -> Result<u32, BtfError> {
        let id = self.find(STRUCT, structure)?;
        self.member(id, member.as_bytes(), 0, &mut { MAX_MEMBERS })
            .ok_or_else(|| BtfError::Missing(format!("{structure}.{member}")))
    }

    pub fn enum_value(&self, name: &str, variant: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("{name}.{variant}"));
        let head = self.head(self.find(ENUM, name)?).ok_or_else(missing)?;
        (0..head.vlen)
            .map(|i| head.position + 12 + 8 * i)
            .find(|value| word(self.types, *value).is_some_and(|n| self.is_named(n, variant.as_bytes())))
            .and_then(|value| word(self.types, value + 4))
            .ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_an_error_not_a_panic() {
        for bytes in [
            &[][..],
            &[0x9f, 0xeb],
            &[0xff; 64],
            &[0x9f, 0xeb, 1, 0, 255, 255, 255, 255, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(Btf::parse(bytes).is_err());
        }
    }

    /// Any type information: an offset that is found is that of a member with this name.
    #[test]
    fn fuzz_btf() {
        devkit::fuzz(file!(), "btf", move |bytes| {
            let Ok(btf) = Btf::parse(bytes) else { return };
            assert!(btf.positions.len() <= bytes.len());
            for (structure, member) in [("task_struct", "pid"), ("cgroup", "kn"), ("a", "b")] {
                let found = btf.offset(structure, member);
                let has = |name: &str| bytes.windows(name.len()).any(|window| window == name.as_bytes());
                assert!(found.is_err() || has(structure) && has(member));
            }
            let _either = btf.enum_value("cgroup_subsys_id", "pids_cgrp_id");
        });
    }
}
