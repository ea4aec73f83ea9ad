//! Scopes of policy.json and namespaces of registries.d: which names stand for an image, the most specific first.
//!
//! `docker`: the full reference, its repository, the repository's parents, the host, then `*.` wildcards of the host's parent
//! domains without its port, then `""`. `dir`, `oci`, `oci-archive`: the absolute path with symlinks resolved, its parents but `/`,
//! then `""`. `docker-archive`: `""` only. A full reference with both tag and digest is looked up as written, then by its digest,
//! then by its tag.

use std::path::{Path, PathBuf};

use crate::reference::{ImageRef, Location};

/// The scopes of an image, the most specific first; the last is the transport's default, `""`.
pub(crate) fn candidates(requested: &Location) -> Vec<String> {
    let mut scopes = match requested {
        Location::Docker(reference) => of_reference(reference),
        Location::Dir(path) | Location::OciDir { path, .. } | Location::OciArchive { path, .. } => of_path(path),
        Location::DockerArchive { .. } => Vec::new(),
    };
    scopes.push(String::new());
    scopes
}

/// The names of a docker reference, without the default.
pub(crate) fn of_reference(reference: &ImageRef) -> Vec<String> {
    let repository = reference.repository();
    let mut scopes = Vec::new();
    if let (Some(tag), Some(digest)) = (reference.tag(), reference.digest()) {
        scopes.push(format!("{repository}:{tag}@{digest}"));
    }
    if let Some(digest) = reference.digest() {
        scopes.push(format!("{repository}@{digest}"));
    }
    if let Some(tag) = reference.tag() {
        scopes.push(format!("{repository}:{tag}"));
    }
    let mut name = repository.as_str();
    loop {
        scopes.push(name.to_owned());
        match name.rsplit_once('/') {
            Some((parent, _)) => name = parent,
            None => break,
        }
    }
    let host = name.split_once(':').map_or(name, |(host, _)| host);
    let mut rest = host;
    while let Some((_, parent)) = rest.split_once('.') {
        scopes.push(format!("*.{parent}"));
        rest = parent;
    }
    scopes
}

fn of_path(path: &Path) -> Vec<String> {
    let Some(path) = resolve(path) else { return Vec::new() };
    path.ancestors().filter(|path| *path != Path::new("/")).filter_map(Path::to_str).map(str::to_owned).collect()
}

/// The absolute path without symlinks; of a path whose last component is not there (yet), by that of its directory. `None` where
/// that cannot be told, so that only a default applies.
fn resolve(path: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(path).ok().or_else(|| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(std::fs::canonicalize(parent).ok()?.join(path.file_name()?))
    })
}

/// Refuses a scope that could never match, since its author meant something by it.
pub(crate) fn validate(transport: &str, scope: &str) -> Result<(), String> {
    if scope.is_empty() {
        return Ok(());
    }
    match transport {
        "docker" => validate_docker(scope),
        "dir" | "oci" | "oci-archive" => validate_path(scope),
        "docker-archive" => Err("docker-archive has only the scope \"\"".into()),
        // Transports that Nacre has not: the policy may be shared with programs that do.
        _ => Ok(()),
    }
}

fn validate_docker(scope: &str) -> Result<(), String> {
    let name = match scope.strip_prefix("*.") {
        Some(domain) if domain.contains(['/', ':', '@']) => {
            return Err("a wildcard scope is *.domain, without port and path".into());
        }
        Some(domain) => domain,
        None => scope,
    };
    if name.contains('*') {
        return Err("a wildcard is allowed only as *. at the beginning".into());
    }
    if name.starts_with('/') || name.ends_with('/') || name.contains("//") || name.contains(char::is_whitespace) {
        return Err("is not a registry host, namespace, repository or reference".into());
    }
    Ok(())
}

fn validate_path(scope: &str) -> Result<(), String> {
    if scope == "/" {
        return Err("the scope \"/\" is not allowed; use \"\"".into());
    }
    let clean =
        scope.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
    if clean { Ok(()) } else { Err("must be an absolute path without '.', '..' and double slashes".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<String> {
        candidates(&text.parse().unwrap())
    }

    #[test]
    fn the_most_specific_scope_comes_first() {
        assert_eq!(
            of("docker://a.b.example:5000/x/y/z:v1"),
            [
                "a.b.example:5000/x/y/z:v1",
                "a.b.example:5000/x/y/z",
                "a.b.example:5000/x/y",
                "a.b.example:5000/x",
                "a.b.example:5000",
                "*.b.example",
                "*.example",
                "",
            ]
        );
        assert_eq!(
            of("docker://busybox"),
            [
                "docker.io/library/busybox:latest",
                "docker.io/library/busybox",
                "docker.io/library",
                "docker.io",
                "*.io",
                "",
            ]
        );
        assert_eq!(of("docker://localhost/x:1"), ["localhost/x:1", "localhost/x", "localhost", ""]);
        let d = format!("sha256:{}", "a".repeat(64));
        assert_eq!(of(&format!("docker://r/../x@{d}").replace("r/../", "r.e/"))[0], format!("r.e/x@{d}"));
        assert_eq!(
            of(&format!("docker://r.e/x:1@{d}"))[..3],
            [format!("r.e/x:1@{d}"), format!("r.e/x@{d}"), "r.e/x:1".to_owned(),]
        );
        assert_eq!(of("docker-archive:/tmp/x.tar:a:1"), [""]);
    }

    #[test]
    fn paths_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        for location in [format!("oci:{}:tag", link.display()), format!("dir:{}", link.display())] {
            let scopes = of(&location);
            assert_eq!(scopes[0], real.to_str().unwrap());
            assert_eq!(scopes[1], real.parent().unwrap().to_str().unwrap());
            assert!(!scopes.contains(&"/".to_owned()) && scopes.last().unwrap().is_empty());
        }
        assert_eq!(of(&format!("dir:{}/new", link.display()))[0], real.join("new").to_str().unwrap());
        assert_eq!(of("dir:/no/such/place"), [""]);
    }

    #[test]
    fn scopes_that_never_match_are_refused() {
        for (transport, scope) in [
            ("docker", "example*.com"),
            ("docker", "*.a.*.com"),
            ("docker", "*.example.com/ns"),
            ("docker", "*.example.com:5000"),
            ("docker", "/x"),
            ("docker", "x/"),
            ("docker", "a b"),
            ("dir", "/"),
            ("dir", "relative"),
            ("oci", "/a/../b"),
            ("oci-archive", "/a/"),
            ("docker-archive", "/a"),
        ] {
            assert!(validate(transport, scope).is_err(), "{transport} {scope}");
        }
        for (transport, scope) in
            [("docker", "*.example.com"), ("docker", "h:5000/a"), ("dir", "/a/b"), ("atomic", "x*")]
        {
            assert!(validate(transport, scope).is_ok(), "{transport} {scope}");
        }
    }
}
