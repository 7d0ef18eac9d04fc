//! Stretches of memory that bytes move through, without a copy in between.
//!
//! # Theory of operation
//!
//! A [`Segment`] is either a piece of an ordinary buffer (a channel that is a file descriptor) or a
//! descriptor's buffer in guest memory (the vhost-user device). Guest memory may change at any moment
//! under our hands, so no `&[u8]` to it ever exists: a segment can only be copied out of, copied into,
//! or handed to the kernel in a `readv`/`writev`. Whoever decides something on bytes of a segment
//! copies them out first and looks at the copy.
//!
//! A [`Cursor`] walks over a list of segments as if they were one run of bytes.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most segments one system call takes (`UIO_MAXIOV`, linux/uio.h).
pub const MAX_IOV: usize = 1024;

/// One contiguous stretch of readable and writable memory, valid for `'a`; others may change it meanwhile.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment<'a> {
    iov: libc::iovec,
    memory: PhantomData<&'a ()>,
}

impl<'a> Segment<'a> {
    /// The segment of `len` bytes at `ptr`.
    ///
    /// # Safety
    /// For all of `'a` the range must be mapped, readable and (if the segment is ever written to)
    /// writable, and no Rust reference to it may exist. Other parties may change its bytes.
    pub unsafe fn from_raw_parts(ptr: *mut u8, len: usize) -> Self {
        Segment {
            iov: libc::iovec {
                iov_base: ptr.cast(),
                iov_len: len,
            },
            memory: PhantomData,
        }
    }

    /// The segment over an ordinary buffer.
    pub fn from_slice(slice: &'a mut [u8]) -> Self {
        // SAFETY: the exclusive borrow lasts for `'a`.
        unsafe { Self::from_raw_parts(slice.as_mut_ptr(), slice.len()) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.iov.iov_len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where it begins.
    pub fn ptr(&self) -> *mut u8 {
        self.iov.iov_base.cast()
    }

    fn slice(&self, from: usize, len: usize) -> Self {
        assert!(from <= self.len() && len <= self.len() - from);
        // SAFETY: a part of a valid segment is valid.
        unsafe { Self::from_raw_parts(self.ptr().add(from), len) }
    }
}

/// A place in a list of segments; reads, writes and system calls go from there on.
#[derive(Clone)]
pub struct Cursor<'s, 'a> {
    segments: &'s [Segment<'a>],
    /// Offset into the first segment of `segments`.
    offset: usize,
    /// Bytes from here to the end.
    remaining: usize,
}

impl<'s, 'a> Cursor<'s, 'a> {
    /// The start of `segments`.
    pub fn new(segments: &'s [Segment<'a>]) -> Self {
        Cursor {
            segments,
            offset: 0,
            remaining: segments.iter().map(Segment::len).sum(),
        }
    }

    /// Bytes from here to the end.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Goes `n` bytes on.
    ///
    /// # Panics
    /// If fewer than `n` bytes remain.
    pub fn advance(&mut self, n: usize) {
        assert!(n <= self.remaining, "cursor advanced past its end");
        self.remaining -= n;
        self.offset += n;
        while let Some(first) = self.segments.first() {
            if self.offset < first.len() {
                break;
            }
            self.offset -= first.len();
            self.segments = &self.segments[1..];
        }
    }

    /// Appends the segments from here on to `out`, at most `max` bytes and not so many that it has more than [`MAX_IOV`];
    /// returns how many bytes they are.
    pub fn take(&self, max: usize, out: &mut Vec<Segment<'a>>) -> usize {
        let most = max.min(self.remaining);
        let (mut taken, mut offset) = (0, self.offset);
        for segment in self.segments {
            if taken == most || out.len() >= MAX_IOV {
                break;
            }
            let n = (segment.len() - offset).min(most - taken);
            if n > 0 {
                out.push(segment.slice(offset, n));
            }
            taken += n;
            offset = 0;
        }
        taken
    }

    /// Copies the next bytes into `dst` and goes past them; returns how many there were.
    pub fn read(&mut self, dst: &mut [u8]) -> usize {
        let n = self.peek(dst);
        self.advance(n);
        n
    }

    /// Copies the next bytes into `dst` and stays; returns how many there were.
    pub fn peek(&self, dst: &mut [u8]) -> usize {
        self.each(dst.len(), |at, segment| {
            // SAFETY: `segment` is valid and `dst[at..]` has room for it; they cannot overlap, as no
            // reference to a segment's memory exists.
            unsafe {
                std::ptr::copy_nonoverlapping(segment.ptr(), dst[at..].as_mut_ptr(), segment.len());
            }
        })
    }

    /// Copies `src` in from here and goes past it.
    ///
    /// # Panics
    /// If fewer than `src.len()` bytes remain.
    pub fn write(&mut self, src: &[u8]) {
        assert!(src.len() <= self.remaining, "write past the cursor's end");
        let n = self.each(src.len(), |at, segment| {
            // SAFETY: as in `peek`.
            unsafe {
                std::ptr::copy_nonoverlapping(src[at..].as_ptr(), segment.ptr(), segment.len());
            }
        });
        self.advance(n);
    }

    /// Calls `f` with the distance from here and each contiguous piece of the next `max` bytes.
    fn each(&self, max: usize, mut f: impl FnMut(usize, Segment<'a>)) -> usize {
        let (mut at, mut offset) = (0, self.offset);
        for segment in self.segments {
            let n = (segment.len() - offset).min(max - at);
            if n > 0 {
                f(at, segment.slice(offset, n));
            }
            at += n;
            offset = 0;
            if at == max {
                break;
            }
        }
        at
    }
}

/// `readv(2)`: fills `segments` from `fd`; 0 is end of file.
pub fn readv(fd: BorrowedFd<'_>, segments: &[Segment<'_>]) -> io::Result<usize> {
    // SAFETY: `Segment` is a transparent `iovec` over valid writable memory.
    retry(|| unsafe {
        libc::readv(
            fd.as_raw_fd(),
            segments.as_ptr().cast(),
            iov_count(segments),
        )
    })
}

/// `writev(2)`: writes `segments` to `fd`.
pub fn writev(fd: BorrowedFd<'_>, segments: &[Segment<'_>]) -> io::Result<usize> {
    // SAFETY: `Segment` is a transparent `iovec` over valid readable memory.
    retry(|| unsafe {
        libc::writev(
            fd.as_raw_fd(),
            segments.as_ptr().cast(),
            iov_count(segments),
        )
    })
}

fn iov_count(segments: &[Segment<'_>]) -> libc::c_int {
    libc::c_int::try_from(segments.len().min(MAX_IOV)).expect("MAX_IOV fits")
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_walks_over_segment_borders() {
        let (mut a, mut b, mut c) = ([1u8, 2, 3], [0u8; 0], [4u8, 5]);
        let segments = [
            Segment::from_slice(&mut a),
            Segment::from_slice(&mut b),
            Segment::from_slice(&mut c),
        ];
        let mut cursor = Cursor::new(&segments);
        let mut out = [0; 4];
        assert_eq!(cursor.peek(&mut out), 4);
        assert_eq!(out, [1, 2, 3, 4]);
        cursor.advance(2);
        cursor.write(&[9, 8]);
        assert_eq!(cursor.remaining(), 1);
        let mut rest = Vec::new();
        assert_eq!(cursor.take(10, &mut rest), 1);
        assert_eq!(rest.len(), 1);
        assert_eq!(cursor.read(&mut out), 1);
        assert_eq!((a, c), ([1, 2, 9], [8, 5]));
    }

    #[test]
    fn no_more_is_taken_than_one_system_call_takes() {
        let mut bytes = [7; 3 * MAX_IOV];
        let segments: Vec<_> = bytes.chunks_mut(2).map(Segment::from_slice).collect();
        let cursor = Cursor::new(&segments);
        let mut out = Vec::new();
        assert_eq!(cursor.take(5, &mut out), 5);
        assert_eq!(cursor.take(usize::MAX, &mut out), 2 * (MAX_IOV - 3));
        assert_eq!(out.len(), MAX_IOV);
        assert_eq!(cursor.take(1, &mut out), 0);
    }
}
