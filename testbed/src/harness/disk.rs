//! A small disk that can run full, break and lose its power: ext4 on a loop device. And a large one, sparse, with XFS.
//!
//! It needs root and loop devices; where it cannot be made, a test says so and passes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::run;

/// `EXT4_IOC_SHUTDOWN` with the flag that leaves the journal unwritten: from here on the file system answers EIO to
/// everything.
const SHUT_DOWN: &str = "import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";

/// What the disk's bytes lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file: the disk does not run full.
    File,
    /// A RAM disk of so many bytes, fewer than the disk seems to have: a thin pool that runs full.
    Thin(u64),
}

/// A mounted disk; unmounted and taken apart when dropped.
pub struct LoopDisk {
    folder: PathBuf,
    device: String,
    mounts: Vec<PathBuf>,
}

impl LoopDisk {
    /// Makes a disk of `bytes` in a new folder. `None`, with a note, where the machine does not allow it.
    ///
    /// # Errors
    /// If something else fails.
    pub fn create(folder: PathBuf, bytes: u64, backing: Backing) -> Result<Option<Self>> {
        fs::create_dir_all(folder.join("disk"))?;
        fs::create_dir_all(folder.join("backing"))?;
        let mut disk = Self { folder, device: String::new(), mounts: Vec::new() };
        let place = disk.folder.join("backing");
        if let Backing::Thin(held) = backing {
            let options = format!("size={held},mode=0700");
            if run("mount", &["-t", "tmpfs", "-o", &options, "farshore", &text(&place)]).is_err() {
                return Ok(skipped("tmpfs"));
            }
            disk.mounts.push(place.clone());
        }
        let image = place.join("image");
        File::create_new(&image)?.set_len(bytes)?;
        match run("losetup", &["--find", "--show", &text(&image)]) {
            Ok(device) => device.trim().clone_into(&mut disk.device),
            Err(_) => return Ok(skipped("loop devices")),
        }
        run("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0", &disk.device])?;
        disk.mount()?;
        Ok(Some(disk))
    }

    /// Makes a sparse disk of `bytes` with XFS, which allocates any space at once. `None`, with a note, where the machine
    /// does not allow it.
    ///
    /// # Errors
    /// If something else fails.
    pub fn create_large(folder: PathBuf, bytes: u64) -> Result<Option<Self>> {
        fs::create_dir_all(folder.join("disk"))?;
        let mut disk = Self { folder, device: String::new(), mounts: Vec::new() };
        let image = disk.folder.join("image");
        File::create_new(&image)?.set_len(bytes)?;
        match run("losetup", &["--find", "--show", &text(&image)]) {
            Ok(device) => device.trim().clone_into(&mut disk.device),
            Err(_) => return Ok(skipped("loop devices")),
        }
        // A small log: it is written at once.
        run("mkfs.xfs", &["-q", "-K", "-l", "size=64m", &disk.device])?;
        if disk.mount().is_err() {
            return Ok(skipped("XFS"));
        }
        Ok(Some(disk))
    }

    /// The root of the file system.
    pub fn root(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Has a folder's content live on this disk: it is moved there and bound to its old place.
    ///
    /// # Errors
    /// If it cannot be moved.
    pub fn take_over(&mut self, folder: &Path) -> Result<()> {
        let name = folder.file_name().context("a folder with a name")?;
        let moved = self.root().join(name);
        fs::create_dir(&moved)?;
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let target = moved.join(entry.file_name());
            run("cp", &["--sparse=always", &text(&entry.path()), &text(&target)])?;
            let length = entry.metadata()?.len();
            if length > 0 {
                // Volumes are thick; a sparse copy that is filled up holds no more of a thin disk than was written.
                run("fallocate", &["--length", &length.to_string(), &text(&target)])?;
            }
        }
        self.bind(folder)
    }

    /// Fills what lies below a [`Backing::Thin`] disk, so that the next block that was never written fails.
    ///
    /// # Errors
    /// If the disk is not thin.
    pub fn fill_backing(&self) -> Result<()> {
        let ballast = self.folder.join("backing/ballast");
        let command = format!("dd if=/dev/zero of={} bs=64k", text(&ballast));
        ensure!(self.mounts.len() > 1, "only a thin disk runs full");
        let ended = Command::new("sh").args(["-c", &command]).output()?;
        ensure!(!ended.status.success(), "the RAM disk did not run full");
        Ok(())
    }

    /// Gives the ballast back.
    ///
    /// # Errors
    /// If there is none.
    pub fn empty_backing(&self) -> Result<()> {
        Ok(fs::remove_file(self.folder.join("backing/ballast"))?)
    }

    /// Breaks the disk: everything fails with EIO, and what was not flushed is lost, as when its power goes.
    ///
    /// # Errors
    /// If the file system cannot be shut down.
    pub fn break_down(&self) -> Result<()> {
        run("/usr/bin/python3", &["-c", SHUT_DOWN, &text(&self.root())])?;
        Ok(())
    }

    /// Mounts the disk again after [`Self::break_down`], with `folder` bound again; nobody may have files open.
    ///
    /// # Errors
    /// If it cannot be mounted.
    pub fn repair(&mut self, folder: &Path) -> Result<()> {
        run("umount", &[text(folder)])?;
        run("umount", &[text(&self.root())])?;
        let (gone, root) = (folder.to_owned(), self.root());
        self.mounts.retain(|mount| *mount != gone && *mount != root);
        self.mount()?;
        self.bind(folder)
    }

    fn mount(&mut self) -> Result<()> {
        let root = self.root();
        run("mount", &[&self.device, &text(&root)])?;
        self.mounts.push(root);
        Ok(())
    }

    fn bind(&mut self, folder: &Path) -> Result<()> {
        let name = folder.file_name().context("a folder with a name")?;
        run("mount", &["--bind", &text(&self.root().join(name)), &text(folder)])?;
        self.mounts.push(folder.to_owned());
        Ok(())
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // The device goes before the RAM disk that it lies on, which was mounted first.
        let thin = (self.mounts.first() == Some(&self.folder.join("backing"))).then(|| self.mounts.remove(0));
        for mount in self.mounts.drain(..).rev() {
            drop(run("umount", &["--lazy", &text(&mount)]));
        }
        if !self.device.is_empty() {
            drop(run("losetup", &["--detach", &self.device]));
        }
        if let Some(mount) = thin {
            drop(run("umount", &["--lazy", &text(&mount)]));
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn skipped(what: &str) -> Option<LoopDisk> {
    let mut out = std::io::stderr().lock();
    drop(writeln!(out, "skipped: this machine gives the test no {what}"));
    None
}
