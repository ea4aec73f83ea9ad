//! Where a store is.

use std::{path::Path as FilePath, sync::Arc};

use object_store::{
    ObjectStore,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    local::LocalFileSystem,
    memory::InMemory,
    path::Path,
};

use crate::ObjectStoreError;

/// Where a store is: a bucket and a prefix in it, a directory, or memory.
#[derive(Clone, Debug)]
pub struct Location {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) prefix: String,
    shown: String,
}

impl Location {
    /// `s3://BUCKET/PREFIX`, with the settings of the usual variables (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL` and so on) out of
    /// `environment`. Without TLS only goes what an endpoint says that begins with `http://`.
    ///
    /// # Errors
    /// [`ObjectStoreError::Location`]: no bucket, or settings that cannot be.
    pub fn s3(url: &str, environment: impl IntoIterator<Item = (String, String)>) -> Result<Self, ObjectStoreError> {
        let wrong = |what: String| ObjectStoreError::Location { location: url.to_owned(), what };
        let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("it does not begin with s3://".to_owned()))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        if bucket.is_empty() {
            return Err(wrong("it names no bucket: s3://BUCKET/PREFIX is expected".to_owned()));
        }
        Path::parse(prefix).map_err(|error| wrong(format!("its prefix cannot be one: {error}")))?;
        let mut builder = AmazonS3Builder::new().with_bucket_name(bucket);
        let mut http = false;
        for (key, value) in environment {
            // Whether TLS is wanted is said by the endpoint, not by a switch that was meant for another one.
            if !key.starts_with("AWS_") || key == "AWS_ALLOW_HTTP" || key.starts_with("AWS_BUCKET") {
                continue;
            }
            let Ok(key) = key.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() else { continue };
            let endpoint = matches!(key, AmazonS3ConfigKey::Endpoint | AmazonS3ConfigKey::S3Endpoint);
            http |= endpoint && value.starts_with("http://");
            builder = builder.with_config(key, value);
        }
        let store = builder.with_allow_http(http).build().map_err(|error| wrong(error.to_string()))?;
        Ok(Self { store: Arc::new(store), prefix: prefix.to_owned(), shown: url.to_owned() })
    }

    /// A directory that is there. Objects are files; each is synced before its PUT returns.
    ///
    /// # Errors
    /// [`ObjectStoreError::Location`]: there is no such directory.
    pub fn directory(path: impl AsRef<FilePath>) -> Result<Self, ObjectStoreError> {
        let shown = path.as_ref().display().to_string();
        let store = LocalFileSystem::new_with_prefix(path)
            .map_err(|error| ObjectStoreError::Location { location: shown.clone(), what: error.to_string() })?;
        Ok(Self { store: Arc::new(store.with_fsync(true)), prefix: String::new(), shown })
    }

    /// Memory of this process. A clone is the same place.
    pub fn memory() -> Self {
        Self { store: Arc::new(InMemory::new()), prefix: String::new(), shown: "objects in memory".to_owned() }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s3(url: &str, environment: &[(&str, &str)]) -> Result<Location, ObjectStoreError> {
        Location::s3(url, environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn urls_name_a_bucket_and_a_prefix() {
        for (url, prefix) in [("s3://b", ""), ("s3://b/", ""), ("s3://b/a/c/", "a/c")] {
            let location = s3(url, &[("AWS_REGION", "eu-central-1"), ("HOME", "/root")]).unwrap();
            assert_eq!((location.prefix.as_str(), location.to_string()), (prefix, url.to_owned()));
        }
        for url in ["s3://", "s3:///a", "http://b/a", "b/a", "s3://b/a//c", "s3://b/../c"] {
            assert!(s3(url, &[]).is_err(), "{url}");
        }
    }

    #[test]
    fn only_an_endpoint_that_says_so_goes_without_tls() {
        let plain = |endpoint| {
            let environment = [("AWS_ENDPOINT_URL", endpoint), ("AWS_ALLOW_HTTP", "true")];
            format!("{:?}", s3("s3://b/a", &environment).unwrap().store)
        };
        let allows = "allow_http: Parsed(true)";
        assert!(plain("http://127.0.0.1:9000").contains(allows));
        assert!(!plain("https://127.0.0.1:9000").contains(allows));
    }
}
