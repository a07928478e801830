//! Comparing and searching files.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};

const CHUNK_BYTES: usize = 1 << 20;

/// The first byte at which two files differ; a shorter file differs at its end.
///
/// # Errors
/// If one cannot be read.
pub fn first_difference(left: &Path, right: &Path) -> Result<Option<u64>> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (mut left, mut right) = (open(left)?, open(right)?);
    let mut offset = 0;
    loop {
        let (one, other) = (chunk(&mut left)?, chunk(&mut right)?);
        if one != other {
            let same = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
            return Ok(Some(offset + u64::try_from(same)?));
        }
        if one.is_empty() {
            return Ok(None);
        }
        offset += u64::try_from(one.len())?;
    }
}

/// True if two files have the same bytes.
///
/// # Errors
/// If one cannot be read.
pub fn files_equal(left: &Path, right: &Path) -> Result<bool> {
    Ok(first_difference(left, right)?.is_none())
}

fn chunk(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(CHUNK_BYTES);
    file.take(u64::try_from(CHUNK_BYTES)?).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The files below a directory that contain the pattern, wherever in the file it stands.
///
/// # Errors
/// If one cannot be read.
pub fn directory_contains(directory: &Path, pattern: &[u8]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![directory.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && file_contains(&entry.path(), pattern)? {
                found.push(entry.path().display().to_string());
            }
        }
    }
    Ok(found)
}

fn file_contains(path: &Path, pattern: &[u8]) -> Result<bool> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut input = BufReader::new(file);
    let mut window = Vec::new();
    loop {
        let before = window.len();
        let limit = u64::try_from(CHUNK_BYTES)?;
        input.by_ref().take(limit).read_to_end(&mut window)?;
        if window.len() == before {
            return Ok(false);
        }
        if contains(&window, pattern) {
            return Ok(true);
        }
        // The pattern may lie across two chunks: keep one byte less than its length.
        let keep = pattern.len().saturating_sub(1).min(window.len());
        window.drain(..window.len() - keep);
    }
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    let Some((first, rest)) = pattern.split_first() else {
        return true;
    };
    let mut left = bytes;
    while let Some(at) = left.iter().position(|byte| byte == first) {
        left = left.get(at + 1..).unwrap_or_default();
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_found_across_chunks_and_in_subfolders() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("below");
        fs::create_dir(&folder).unwrap();
        let mut bytes = vec![b'm'; CHUNK_BYTES - 3];
        bytes.extend_from_slice(b"marker");
        fs::write(folder.join("file"), &bytes).unwrap();
        assert_eq!(directory_contains(directory.path(), b"marker").unwrap().len(), 1);
        assert!(directory_contains(directory.path(), b"Marker").unwrap().is_empty());
    }

    #[test]
    fn files_differ_at_the_first_byte_that_differs_or_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut bytes = vec![7; CHUNK_BYTES + 10];
        fs::write(path("a"), &bytes).unwrap();
        fs::write(path("b"), &bytes).unwrap();
        assert!(files_equal(&path("a"), &path("b")).unwrap());
        bytes[CHUNK_BYTES + 4] = 8;
        fs::write(path("b"), &bytes).unwrap();
        assert_eq!(first_difference(&path("a"), &path("b")).unwrap(), Some(1_048_580));
        fs::write(path("b"), &bytes[..5]).unwrap();
        assert_eq!(first_difference(&path("a"), &path("b")).unwrap(), Some(5));
    }
}
