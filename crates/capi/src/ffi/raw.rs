//! The structures of the header, and how pointers become references, slices and handles, and back.

#![expect(unsafe_code, reason = "a C interface has raw pointers")]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
};

use nacre_lazy::erofs::{FileType, Inode};
use rustix::io::Errno;

use crate::{
    failure::{Failure, Outcome, guard},
    handles::{Entry, Options},
};

/// `nacre_options`
#[repr(C)]
pub(super) struct RawOptions {
    size: usize,
    directory: *const c_char,
    config: *const c_char,
    cache: *const c_char,
    cache_limit: u64,
    patience: u32,
    reserved: u32,
}

/// The most bytes of options of later versions.
const OPTIONS_LIMIT: usize = 4096;

/// `nacre_stat`
#[repr(C)]
pub(super) struct RawStat {
    ino: u64,
    size: u64,
    mtime: i64,
    mtime_nanoseconds: u32,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    device_major: u32,
    device_minor: u32,
    reserved: u32,
}

/// `nacre_dirent`
#[repr(C)]
pub(super) struct RawDirent {
    ino: u64,
    kind: u32,
    length: u32,
    name: [u8; 256],
}

pub(super) fn null(what: &str) -> Failure {
    Failure::invalid(format!("{what} is NULL"))
}

/// A handle, or what a caller lends.
pub(super) unsafe fn lent<'a, T>(pointer: *const T, what: &str) -> Outcome<&'a T> {
    // SAFETY: null or valid while the call takes (see the module).
    unsafe { pointer.as_ref() }.ok_or_else(|| null(what))
}

pub(super) unsafe fn optional<'a>(pointer: *const c_char) -> Option<&'a [u8]> {
    // SAFETY: not null here; the caller's strings end with a zero (see the module).
    (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) }.to_bytes())
}

pub(super) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Outcome<&'a [u8]> {
    // SAFETY: as of the function that is called.
    unsafe { optional(pointer) }.ok_or_else(|| null(what))
}

/// The caller's buffer. What is in it is never read.
pub(super) unsafe fn buffer<'a>(pointer: *mut c_void, length: usize) -> Outcome<&'a mut [u8]> {
    if length == 0 {
        return Ok(&mut []);
    }
    if pointer.is_null() {
        return Err(Failure::new(Errno::FAULT, "the buffer is NULL"));
    }
    if isize::try_from(length).is_err() {
        return Err(Failure::invalid("the buffer's length is none"));
    }
    // SAFETY: the caller's buffer has so many bytes, and nobody else uses it while the call takes (see the module); its length fits.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer.cast(), length) })
}

/// Writes a result.
pub(super) unsafe fn put<T>(to: *mut T, what: &str, value: T) -> Outcome<c_int> {
    if to.is_null() {
        return Err(null(what));
    }
    // SAFETY: not null, and room for it (see the module).
    unsafe { to.write(value) };
    Ok(0)
}

/// Makes a handle. Whoever does not look at what is returned finds null there.
pub(super) unsafe fn handle<T>(to: *mut *mut T, what: &str, make: impl FnOnce() -> Outcome<T>) -> Outcome<c_int> {
    // SAFETY: as of `put`.
    unsafe { put(to, what, ptr::null_mut()) }?;
    let made = Box::into_raw(Box::new(make()?));
    // SAFETY: as of `put`.
    unsafe { put(to, what, made) }
}

/// Ends a handle.
pub(super) unsafe fn close<T>(pointer: *mut T) {
    guard(|| {
        if !pointer.is_null() {
            // SAFETY: it comes from `handle`, once (see the module).
            drop(unsafe { Box::from_raw(pointer) });
        }
        Ok(0i32)
    });
}

pub(super) fn length(length: usize) -> Outcome<isize> {
    isize::try_from(length).map_err(|_| Failure::new(Errno::OVERFLOW, "it is too long"))
}

/// A value as getxattr(2) gives it.
pub(super) fn answer(value: &[u8], out: &mut [u8]) -> Outcome<isize> {
    if !out.is_empty() {
        let room = out.get_mut(..value.len()).ok_or_else(|| Failure::new(Errno::RANGE, "the buffer is too small"))?;
        room.copy_from_slice(value);
    }
    length(value.len())
}

impl RawStat {
    pub(super) fn of(inode: &Inode) -> Self {
        Self {
            ino: inode.nid,
            size: inode.size,
            mtime: inode.mtime.seconds,
            mtime_nanoseconds: inode.mtime.nanoseconds,
            mode: type_bits(inode.file_type) | u32::from(inode.mode),
            links: inode.links,
            uid: inode.uid,
            gid: inode.gid,
            device_major: inode.device.major,
            device_minor: inode.device.minor,
            reserved: 0,
        }
    }
}

impl RawDirent {
    pub(super) fn of(entry: &Entry) -> Self {
        let mut name = [0; 256];
        // A name of an image has 255 bytes at most, and a zero is behind it.
        let length = entry.name.len().min(name.len() - 1);
        name.iter_mut().zip(entry.name.iter().take(length)).for_each(|(to, from)| *to = *from);
        let length = u32::try_from(length).unwrap_or(0);
        Self { ino: entry.nid, kind: type_bits(entry.file_type), length, name }
    }
}

/// The bits of `st_mode` for a type.
fn type_bits(file_type: FileType) -> u32 {
    match file_type {
        FileType::Regular => 0o10_0000,
        FileType::Directory => 0o04_0000,
        FileType::CharDevice => 0o02_0000,
        FileType::BlockDevice => 0o06_0000,
        FileType::Fifo => 0o01_0000,
        FileType::Socket => 0o14_0000,
        FileType::Symlink => 0o12_0000,
    }
}

/// What the caller's options say.
pub(super) unsafe fn options<'a>(pointer: *const RawOptions) -> Outcome<Options<'a>> {
    let known = size_of::<RawOptions>();
    if pointer.is_null() {
        return Err(null("options"));
    }
    // SAFETY: not null, and every version of the options begins with its size.
    let size = unsafe { pointer.cast::<usize>().read() };
    if !(known..=OPTIONS_LIMIT).contains(&size) {
        return Err(Failure::invalid(format!("options.size is {size}; it must be sizeof(nacre_options), {known}")));
    }
    // SAFETY: there are `size` bytes of options, and what is behind those that we know is read as bytes.
    let (raw, rest) = unsafe {
        let rest = pointer.cast::<u8>().add(known);
        (&*pointer, std::slice::from_raw_parts(rest, size - known))
    };
    if raw.reserved != 0 || rest.iter().any(|byte| *byte != 0) {
        return Err(Failure::invalid("the options have fields that are set, and that this version does not know"));
    }
    // SAFETY: strings of the caller.
    unsafe {
        Ok(Options {
            directory: text(raw.directory, "options.directory")?,
            config: optional(raw.config),
            cache: optional(raw.cache),
            cache_limit: raw.cache_limit,
            patience: raw.patience,
        })
    }
}
