//! Listings of a directory repository.
//!
//! One page reads each directory it meets once (again only where folders turn out to be empty), keeps no more names than the page is long, and looks at
//! no file that is not on it. The order is that of the whole keys: a folder sorts with its `/`, so `a-b` comes before
//! what is in `a`.

use std::collections::BinaryHeap;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::root::{Root, meta};
use crate::store::key::is_part;
use crate::store::{Key, ListRequest, Listing, Op, StoreError};

/// A page as it fills.
struct Page<'r> {
    request: &'r ListRequest,
    listing: Listing,
    last: String,
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Flow {
    More,
    Full,
}

impl Page<'_> {
    /// Room for one more name, or the page ends before it.
    fn room(&mut self) -> bool {
        let room = self.listing.objects.len() + self.listing.folders.len() < self.request.page();
        if !room {
            self.listing.next = Some(std::mem::take(&mut self.last));
        }
        room
    }
}

impl Root {
    pub(super) fn list(&self, request: &ListRequest) -> Result<Listing, StoreError> {
        let (folder, stem) = match request.prefix.rfind('/') {
            Some(slash) => request.prefix.split_at(slash + 1),
            None => ("", request.prefix.as_str()),
        };
        let mut page = Page { request, listing: Listing::default(), last: String::new() };
        let mut parts = folder.split_terminator('/');
        // No key has such parts, and a path made of them could leave the root.
        if parts.all(is_part)
            && let Some(directory) = self.walk(Op::List, &request.prefix, folder.split_terminator('/'))?
        {
            self.visit(&directory, folder, stem, &mut page)?;
        }
        // At the end: an empty answer from a directory that has gone away is no answer.
        self.check_there()?;
        Ok(page.listing)
    }

    /// Lists what lies in `directory`, whose keys begin with `base`, as far as names begin with `stem`.
    fn visit(&self, directory: &OwnedFd, base: &str, stem: &str, page: &mut Page<'_>) -> Result<Flow, StoreError> {
        let mut from = String::new();
        loop {
            let batch = self.smallest(directory, base, stem, &from, page)?;
            let Some(last) = batch.last() else { return Ok(Flow::More) };
            from = last.clone();
            for name in batch {
                if self.show(directory, base, &name, page)? == Flow::Full {
                    return Ok(Flow::Full);
                }
            }
        }
    }

    /// Puts one name of a directory on the page; a folder's ends in `/`.
    fn show(&self, directory: &OwnedFd, base: &str, name: &str, page: &mut Page<'_>) -> Result<Flow, StoreError> {
        let full = format!("{base}{name}");
        let Some(folder) = name.strip_suffix('/') else {
            let Ok(key) = Key::new(full) else { return Ok(Flow::More) }; // too long to be one of ours
            return match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => Ok(Flow::More), // deleted since we read the name
                Err(errno) => Err(self.fail_key(Op::List, &key, errno)),
                Ok(_) if !page.room() => Ok(Flow::Full),
                Ok(stat) => {
                    page.last = key.to_string();
                    page.listing.objects.push(meta(key, &stat));
                    Ok(Flow::More)
                }
            };
        };
        let Some(inside) = self.open_folder(directory, &full, folder)? else { return Ok(Flow::More) };
        if !page.request.delimited {
            return self.visit(&inside, &full, "", page);
        }
        if !self.has_object(&inside, &full)? {
            return Ok(Flow::More);
        }
        if !page.room() {
            return Ok(Flow::Full);
        }
        page.last.clone_from(&full);
        page.listing.folders.push(full);
        Ok(Flow::More)
    }

    fn open_folder(&self, directory: &OwnedFd, full: &str, name: &str) -> Result<Option<OwnedFd>, StoreError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(folder) => Ok(Some(folder)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None), // removed, or replaced, since we read the name
            Err(errno) => Err(self.fail(Op::List, full, errno)),
        }
    }

    /// The smallest names of a directory beyond `from` that can be on the page, sorted, one more than fit on it.
    fn smallest(
        &self,
        directory: &OwnedFd,
        base: &str,
        stem: &str,
        from: &str,
        page: &Page<'_>,
    ) -> Result<Vec<String>, StoreError> {
        let wanted = page.request.page() - (page.listing.objects.len() + page.listing.folders.len()) + 1;
        let mut heap = BinaryHeap::new();
        self.each_name(directory, base, |name| {
            let may_show = name.starts_with(stem) && name.as_str() > from && reaches_page(base, &name, page.request);
            if may_show && (heap.len() < wanted || heap.peek().is_some_and(|largest| name < *largest)) {
                heap.push(name);
                if heap.len() > wanted {
                    heap.pop();
                }
            }
            Ok(true)
        })?;
        Ok(heap.into_sorted_vec())
    }

    /// Whether there is an object anywhere in a folder. Usually the first name read tells.
    fn has_object(&self, directory: &OwnedFd, base: &str) -> Result<bool, StoreError> {
        let mut found = false;
        self.each_name(directory, base, |name| {
            found = match name.strip_suffix('/') {
                None => true,
                Some(folder) => {
                    let full = format!("{base}{name}");
                    match self.open_folder(directory, &full, folder)? {
                        Some(inside) => self.has_object(&inside, &full)?,
                        None => false,
                    }
                }
            };
            Ok(!found)
        })?;
        Ok(found)
    }

    /// Calls `each` with every name of a directory that can be part of a key, in no order, until it says `false`.
    fn each_name(
        &self,
        directory: &OwnedFd,
        base: &str,
        mut each: impl FnMut(String) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        let fail = |errno: Errno| self.fail(Op::List, base, errno);
        for entry in Dir::read_from(directory).map_err(fail)? {
            let entry = match entry {
                Err(Errno::NOENT) => return Ok(()), // the directory was removed as we read it
                entry => entry.map_err(fail)?,
            };
            // What cannot be part of a key is not ours: temporaries, `lost+found`, `.nfs…`.
            let Some(name) = entry.file_name().to_str().ok().filter(|name| is_part(name)) else { continue };
            let mut kind = entry.file_type();
            if kind == FileType::Unknown {
                kind = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(Errno::NOENT) => continue,
                    Err(errno) => return Err(fail(errno)),
                };
            }
            // Passing over a link would say "not there" of what lies behind it.
            self.refuse_stranger(name, kind)?;
            let slash = if kind == FileType::Directory { "/" } else { "" };
            if !each(format!("{name}{slash}"))? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Whether a name, or for a folder in a flat listing something in it, comes after `request.after`.
fn reaches_page(base: &str, name: &str, request: &ListRequest) -> bool {
    let Some(after) = request.after.as_deref() else { return true };
    let full = format!("{base}{name}");
    full.as_str() > after || (!request.delimited && name.ends_with('/') && after.starts_with(&full))
}
