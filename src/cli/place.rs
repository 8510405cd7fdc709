//! Is a directory inside the data directory of a server? A repository there would be copied into its own backups, and
//! would go when the data directory goes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The data directory that holds `path`, which need not be there yet.
///
/// Looks at the file system for what makes a data directory, and, for a server on this host, compares with `of_server`,
/// what it calls its own: by device and inode, so that links and mounts do not hide it.
pub fn data_directory_around(path: &Path, of_server: Option<&Path>) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    // The deepest part that is there, without links; what follows cannot lead out of it again.
    let real = path.ancestors().find_map(|ancestor| fs::canonicalize(ancestor).ok()).unwrap_or_else(|| path.clone());
    let identity = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let server = of_server.and_then(identity);
    let found = real.ancestors().find(|ancestor| {
        let is_data = ancestor.join("PG_VERSION").is_file() && ancestor.join("global/pg_control").is_file();
        is_data || (server.is_some() && identity(ancestor) == server)
    });
    // The server's directory is usually closed to others: its name has to do then.
    let by_name = || of_server.filter(|dir| server.is_none() && path.starts_with(dir)).map(Path::to_path_buf);
    found.map(Path::to_path_buf).or_else(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_is_found_by_what_lies_in_it_and_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let data = fs::canonicalize(dir.path()).unwrap().join("data");
        fs::create_dir_all(data.join("global")).unwrap();
        fs::create_dir_all(dir.path().join("beside")).unwrap();
        let inside = data.join("not/yet/there");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&data, &link).unwrap();

        assert_eq!(data_directory_around(&inside, None), None, "nothing says that this is one");
        assert_eq!(data_directory_around(&link.join("repo"), Some(&data)), Some(data.clone()), "the server says so");
        assert_eq!(data_directory_around(&dir.path().join("beside/repo"), Some(&data)), None);

        fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        fs::write(data.join("global/pg_control"), "").unwrap();
        assert_eq!(data_directory_around(&inside, None), Some(data.clone()));
        assert_eq!(data_directory_around(&data, None), Some(data.clone()), "the directory itself");
        assert_eq!(data_directory_around(&link.join("repo"), None), Some(data));
        assert_eq!(data_directory_around(&dir.path().join("beside"), None), None);
        assert_eq!(
            data_directory_around(Path::new("/no/such/data/repo"), Some(Path::new("/no/such/data"))),
            Some(PathBuf::from("/no/such/data")),
            "by name, where it cannot be looked at"
        );
    }
}
