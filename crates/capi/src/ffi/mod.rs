//! The functions of `include/nacre.h`. Here pointers become references, slices and handles, and nothing else happens.
//!
//! What the header demands of callers is what each function here relies on: pointers are null, or valid for what they are said to be, for as
//! long as the call takes; strings end with a zero; a handle comes from the function that makes it, and is not used while or after it is
//! closed. Null is looked for everywhere.

#![expect(unsafe_code, reason = "a C interface has raw pointers and exported names")]

mod raw;

use std::{
    ffi::{c_char, c_int, c_void},
    ptr,
    sync::Arc,
};

use crate::{
    failure::{self, guard},
    handles::{OpenDir, OpenFile, OpenImage, Store},
};
use raw::{RawDirent, RawOptions, RawStat, answer, buffer, close, handle, length, lent, null, options, put, text};

type Image = Arc<OpenImage>;

/// `nacre_error`
#[unsafe(no_mangle)]
extern "C" fn nacre_error() -> *const c_char {
    failure::last()
}

/// `nacre_store_open`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_store_open(options_: *const RawOptions, store: *mut *mut Store) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { handle(store, "store", || Store::open(&options(options_)?)) })
}

/// `nacre_store_close`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_store_close(store: *mut Store) {
    // SAFETY: a handle (see the module).
    unsafe { close(store) }
}

/// `nacre_image_open`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_image_open(store: *const Store, reference: *const c_char, image: *mut *mut Image) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        handle(image, "image", || {
            let reference = text(reference, "reference")?;
            let image = lent(store, "store")?.image(reference).map_err(|failure| failure.about(reference))?;
            Ok(Arc::new(image))
        })
    })
}

/// `nacre_image_close`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_image_close(image: *mut Image) {
    // SAFETY: a handle (see the module).
    unsafe { close(image) }
}

/// `nacre_image_digest`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_image_digest(image: *const Image) -> *const c_char {
    // SAFETY: a handle (see the module); the string lives as long as it.
    unsafe { image.as_ref() }.map_or(ptr::null(), |image| image.digest.as_ptr())
}

/// `nacre_image_config`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_image_config(image: *const Image) -> *const c_char {
    // SAFETY: a handle (see the module); the string lives as long as it.
    unsafe { image.as_ref() }.map_or(ptr::null(), |image| image.config.as_ptr())
}

unsafe fn stat_of(image: *const Image, path: *const c_char, out: *mut RawStat, follow: bool) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        let found = lent(image, "image")?.find(text(path, "path")?, follow)?;
        put(out, "out", RawStat::of(&found))
    })
}

/// `nacre_stat_path`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_stat_path(image: *const Image, path: *const c_char, out: *mut RawStat) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    unsafe { stat_of(image, path, out, true) }
}

/// `nacre_lstat_path`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_lstat_path(image: *const Image, path: *const c_char, out: *mut RawStat) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    unsafe { stat_of(image, path, out, false) }
}

/// `nacre_readlink`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_readlink(image: *const Image, path: *const c_char, out: *mut c_char, room: usize) -> isize {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        let target = lent(image, "image")?.read_link(text(path, "path")?)?;
        let out = buffer(out.cast(), room)?;
        out.iter_mut().zip(&target).for_each(|(to, from)| *to = *from);
        length(target.len())
    })
}

/// `nacre_open`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_open(image: *const Image, path: *const c_char, file: *mut *mut OpenFile) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { handle(file, "file", || OpenFile::open(lent(image, "image")?, text(path, "path")?)) })
}

/// `nacre_close`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_close(file: *mut OpenFile) {
    // SAFETY: a handle (see the module).
    unsafe { close(file) }
}

/// `nacre_fstat`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_fstat(file: *const OpenFile, out: *mut RawStat) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { put(out, "out", RawStat::of(&lent(file, "file")?.inode)) })
}

/// `nacre_pread`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_pread(file: *const OpenFile, out: *mut c_void, room: usize, offset: u64) -> isize {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { length(lent(file, "file")?.read_at(offset, buffer(out, room)?)?) })
}

/// `nacre_read`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_read(file: *const OpenFile, out: *mut c_void, room: usize) -> isize {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { length(lent(file, "file")?.read(buffer(out, room)?)?) })
}

/// `nacre_opendir`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_opendir(image: *const Image, path: *const c_char, dir: *mut *mut OpenDir) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe { handle(dir, "dir", || OpenDir::open(lent(image, "image")?, text(path, "path")?)) })
}

/// `nacre_closedir`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_closedir(dir: *mut OpenDir) {
    // SAFETY: a handle (see the module).
    unsafe { close(dir) }
}

/// `nacre_readdir`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_readdir(dir: *const OpenDir, entry: *mut RawDirent) -> c_int {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        let dir = lent(dir, "dir")?;
        if entry.is_null() {
            return Err(null("entry"));
        }
        let Some(found) = dir.next()? else { return Ok(0) };
        put(entry, "entry", RawDirent::of(&found))?;
        Ok(1)
    })
}

/// `nacre_rewinddir`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_rewinddir(dir: *const OpenDir) {
    // SAFETY: a handle (see the module).
    guard(|| unsafe {
        lent(dir, "dir")?.rewind();
        Ok(0i32)
    });
}

unsafe fn xattr_of(
    image: *const Image,
    (path, name): (*const c_char, *const c_char),
    (out, room): (*mut c_void, usize),
    follow: bool,
) -> isize {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        let value = lent(image, "image")?.xattr(text(path, "path")?, text(name, "name")?, follow)?;
        answer(&value, buffer(out, room)?)
    })
}

/// `nacre_getxattr`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_getxattr(
    image: *const Image,
    path: *const c_char,
    name: *const c_char,
    out: *mut c_void,
    room: usize,
) -> isize {
    // SAFETY: pointers of the caller (see the module).
    unsafe { xattr_of(image, (path, name), (out, room), true) }
}

/// `nacre_lgetxattr`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_lgetxattr(
    image: *const Image,
    path: *const c_char,
    name: *const c_char,
    out: *mut c_void,
    room: usize,
) -> isize {
    // SAFETY: pointers of the caller (see the module).
    unsafe { xattr_of(image, (path, name), (out, room), false) }
}

unsafe fn names_of(image: *const Image, path: *const c_char, (out, room): (*mut c_char, usize), follow: bool) -> isize {
    // SAFETY: pointers of the caller (see the module).
    guard(|| unsafe {
        let names = lent(image, "image")?.xattr_names(text(path, "path")?, follow)?;
        answer(&names, buffer(out.cast(), room)?)
    })
}

/// `nacre_listxattr`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_listxattr(image: *const Image, path: *const c_char, out: *mut c_char, room: usize) -> isize {
    // SAFETY: pointers of the caller (see the module).
    unsafe { names_of(image, path, (out, room), true) }
}

/// `nacre_llistxattr`
#[unsafe(no_mangle)]
unsafe extern "C" fn nacre_llistxattr(
    image: *const Image,
    path: *const c_char,
    out: *mut c_char,
    room: usize,
) -> isize {
    // SAFETY: pointers of the caller (see the module).
    unsafe { names_of(image, path, (out, room), false) }
}
