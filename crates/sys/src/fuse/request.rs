//! Requests of the kernel, parsed: every length is checked, and what is not known is [`Operation::Unknown`].

use zerocopy::FromBytes;

use super::wire::{BatchForgetIn, ForgetIn, ForgetOne, InHeader, InitIn, InterruptIn, ReadIn, XattrIn, opcode};

/// Why bytes are no request.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// Not even a header; there is nobody to answer.
    #[error("a request of {length} bytes has no whole header; this is a defect of the kernel")]
    Header {
        /// What there is.
        length: usize,
    },
    /// The header can be trusted, and what follows cannot.
    #[error("request {unique} (operation {opcode}) {what}; this is a defect of the kernel or of this program")]
    Body {
        /// Which one, to be answered with EINVAL.
        unique: u64,
        /// What was asked.
        opcode: u32,
        /// What is wrong.
        what: &'static str,
    },
}

/// A request.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) header: InHeader,
    pub(super) operation: Operation<'a>,
}

/// What is asked of the inode of the header.
#[derive(Debug)]
pub(super) enum Operation<'a> {
    Init {
        init: InitIn,
        /// Flags beyond the 32nd; 0 from kernels that have none.
        flags2: u32,
    },
    Lookup {
        name: &'a [u8],
    },
    Attributes,
    ReadLink,
    Open,
    OpenDirectory,
    Read {
        offset: u64,
        size: usize,
    },
    ReadDirectory {
        offset: u64,
        size: usize,
        plus: bool,
    },
    Statfs,
    GetXattr {
        name: &'a [u8],
        size: usize,
    },
    ListXattr {
        size: usize,
    },
    /// A file or directory was closed.
    Release,
    Forget {
        lookups: u64,
    },
    BatchForget(&'a [u8]),
    Interrupt {
        unique: u64,
    },
    /// The filesystem is gone.
    Destroy,
    Unknown,
}

impl<'a> Request<'a> {
    /// Parses what one read of the device gave.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, RequestError> {
        let length = bytes.len();
        let (header, _) = InHeader::read_from_prefix(bytes).map_err(|_| RequestError::Header { length })?;
        let wrong = |what| RequestError::Body { unique: header.unique, opcode: header.opcode, what };
        if usize::try_from(header.length).ok() != Some(length) {
            return Err(wrong("says another length than it has"));
        }
        // Extensions, which nothing here asks for, are the last part.
        let end = length.saturating_sub(usize::from(header.extensions) * 8);
        let body = bytes.get(size_of::<InHeader>()..end).ok_or_else(|| wrong("is shorter than its extensions"))?;
        let operation = Operation::parse(header.opcode, body).map_err(wrong)?;
        Ok(Self { header, operation })
    }
}

impl<'a> Operation<'a> {
    fn parse(code: u32, body: &'a [u8]) -> Result<Self, &'static str> {
        Ok(match code {
            opcode::INIT => {
                let (init, rest) = prefix::<InitIn>(body)?;
                Self::Init { init, flags2: prefix::<u32>(rest).map_or(0, |(flags, _)| flags) }
            }
            opcode::LOOKUP => Self::Lookup { name: name(body)? },
            opcode::GETATTR => Self::Attributes,
            opcode::READLINK => Self::ReadLink,
            opcode::OPEN => Self::Open,
            opcode::OPENDIR => Self::OpenDirectory,
            opcode::READ => {
                let (read, _) = prefix::<ReadIn>(body)?;
                Self::Read { offset: read.offset, size: size(read.size)? }
            }
            opcode::READDIR | opcode::READDIRPLUS => {
                let (read, _) = prefix::<ReadIn>(body)?;
                Self::ReadDirectory { offset: read.offset, size: size(read.size)?, plus: code == opcode::READDIRPLUS }
            }
            opcode::STATFS => Self::Statfs,
            opcode::GETXATTR => {
                let (get, rest) = prefix::<XattrIn>(body)?;
                Self::GetXattr { name: name(rest)?, size: size(get.size)? }
            }
            opcode::LISTXATTR => Self::ListXattr { size: size(prefix::<XattrIn>(body)?.0.size)? },
            opcode::RELEASE | opcode::RELEASEDIR => Self::Release,
            opcode::FORGET => Self::Forget { lookups: prefix::<ForgetIn>(body)?.0.lookups },
            opcode::BATCH_FORGET => {
                let (batch, rest) = prefix::<BatchForgetIn>(body)?;
                let length = size(batch.count)?.checked_mul(size_of::<ForgetOne>());
                let inodes = length.and_then(|length| rest.get(..length));
                Self::BatchForget(inodes.ok_or("has fewer inodes than it says")?)
            }
            opcode::INTERRUPT => Self::Interrupt { unique: prefix::<InterruptIn>(body)?.0.unique },
            opcode::DESTROY => Self::Destroy,
            _ => Self::Unknown,
        })
    }
}

/// The inodes of a BATCH_FORGET.
pub(super) fn forgotten(inodes: &[u8]) -> impl Iterator<Item = ForgetOne> {
    inodes.chunks_exact(size_of::<ForgetOne>()).filter_map(|bytes| ForgetOne::read_from_bytes(bytes).ok())
}

fn prefix<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), &'static str> {
    T::read_from_prefix(bytes).map_err(|_| "is shorter than its operation needs")
}

/// A name ends with a zero.
fn name(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    match (parts.next(), parts.next()) {
        (Some(name), Some(_)) if !name.is_empty() => Ok(name),
        _ => Err("has no name, or one without an end"),
    }
}

fn size(size: u32) -> Result<usize, &'static str> {
    usize::try_from(size).map_err(|_| "is larger than this machine's memory")
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn request(code: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { length, opcode: code, unique: 6, node: 1, ..InHeader::default() };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn names_and_numbers_are_found() {
        let lookup = request(opcode::LOOKUP, b"name\0");
        assert!(matches!(Request::parse(&lookup).unwrap().operation, Operation::Lookup { name: b"name" }));
        let read = ReadIn { offset: 1 << 40, size: 4096, ..ReadIn::default() };
        let read = request(opcode::READ, read.as_bytes());
        let parsed = Request::parse(&read).unwrap();
        assert!(matches!(parsed.operation, Operation::Read { offset, size: 4096 } if offset == 1 << 40));
        let get = [XattrIn { size: 9, padding: 0 }.as_bytes(), b"user.x\0"].concat();
        let get = request(opcode::GETXATTR, &get);
        assert!(matches!(Request::parse(&get).unwrap().operation, Operation::GetXattr { name: b"user.x", size: 9 }));
        let two = [BatchForgetIn { count: 2, padding: 0 }.as_bytes(), &[0; 32]].concat();
        let two = request(opcode::BATCH_FORGET, &two);
        let Operation::BatchForget(inodes) = Request::parse(&two).unwrap().operation else { panic!("no batch") };
        assert_eq!(forgotten(inodes).count(), 2);
        assert!(matches!(Request::parse(&request(9999, b"x")).unwrap().operation, Operation::Unknown));
    }

    #[test]
    fn an_old_kernels_init_has_no_second_flags() {
        let init = InitIn { major: 7, minor: 31, max_readahead: 1, flags: 2 };
        let bytes = request(opcode::INIT, init.as_bytes());
        assert!(matches!(Request::parse(&bytes).unwrap().operation, Operation::Init { flags2: 0, .. }));
        let bytes = request(opcode::INIT, &[init.as_bytes(), &[5, 0, 0, 0], &[0; 44]].concat());
        assert!(matches!(Request::parse(&bytes).unwrap().operation, Operation::Init { flags2: 5, .. }));
    }

    #[test]
    fn extensions_are_no_part_of_a_name() {
        let mut bytes = request(opcode::LOOKUP, b"name\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
        let mut header = InHeader::read_from_prefix(&bytes).unwrap().0;
        header.extensions = 1;
        bytes.splice(..size_of::<InHeader>(), header.as_bytes().iter().copied());
        assert!(matches!(Request::parse(&bytes).unwrap().operation, Operation::Lookup { name: b"name" }));
        header.extensions = u16::MAX;
        bytes.splice(..size_of::<InHeader>(), header.as_bytes().iter().copied());
        assert!(matches!(Request::parse(&bytes), Err(RequestError::Body { .. })));
    }

    #[test]
    fn what_is_cut_or_lies_is_refused_and_says_whom_to_answer() {
        let bodies: [(u32, &[u8]); 8] = [
            (opcode::LOOKUP, b"name"),
            (opcode::LOOKUP, b"\0"),
            (opcode::READ, &[0; 39]),
            (opcode::READDIR, &[0; 8]),
            (opcode::GETXATTR, &[0; 8]),
            (opcode::FORGET, &[0; 7]),
            (opcode::BATCH_FORGET, &[255; 24]),
            (opcode::INTERRUPT, &[]),
        ];
        for (code, body) in bodies {
            let error = Request::parse(&request(code, body)).unwrap_err();
            assert!(matches!(error, RequestError::Body { unique: 6, .. }), "{code}: {error}");
        }
        let mut long = request(opcode::STATFS, &[]);
        long.push(0);
        assert!(matches!(Request::parse(&long), Err(RequestError::Body { .. })));
        for length in 0..size_of::<InHeader>() {
            assert!(matches!(Request::parse(&vec![1; length]), Err(RequestError::Header { .. })));
        }
    }

    #[test]
    fn garbage_never_panics() {
        let mut rng = nacre_testkit::Rng::new(7);
        for _ in 0..200_000 {
            let length = rng.below(200);
            let mut bytes = rng.bytes(length);
            // Half of them get past the header.
            if rng.below(2) == 0
                && let Ok((header, _)) = InHeader::mut_from_prefix(&mut bytes)
            {
                header.length = u32::try_from(length).unwrap();
                header.opcode = u32::try_from(rng.below(60)).unwrap();
                header.extensions = u16::try_from(rng.below(3)).unwrap();
            }
            let _ = Request::parse(&bytes).map(|request| format!("{request:?}"));
        }
    }
}
