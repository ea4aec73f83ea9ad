/*
 * Nacre: the files of a lazy image, each byte verified when it is read, for programs that cannot have them mounted.
 *
 * What a function returns: 0 or more, or a negative number of <errno.h>; nacre_error() then says in words what is wrong.
 *   -EACCES   the image is not trusted, or its key is not released to us
 *   -EBADMSG  the image is not what its manifest, or whoever encrypted it, says
 *   -EIO      a read failed: no source has the right bytes, or none answered in time
 *   -EINVAL   an argument or the configuration is wrong
 *   others    as of the system calls of the same names
 *
 * All functions may be called by several threads at once, with the same handles, but that a handle may not be used while or after it is
 * closed. Handles may be closed in any order. Paths lead from the image's root, with or without a slash at their beginning; symbolic links
 * are followed within the image, 40 at most, and ".." does not lead out of it. Strings are bytes that end with a zero.
 */
#ifndef NACRE_H
#define NACRE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What images have in common: trust, keys, registries; a cache, connections. */
typedef struct nacre_store nacre_store;
/* An image that was admitted, and whose names are there. */
typedef struct nacre_image nacre_image;
/* An open regular file. */
typedef struct nacre_file nacre_file;
/* An open directory. */
typedef struct nacre_dir nacre_dir;

/* Begin with NACRE_OPTIONS, or with zeroes and the size. */
typedef struct nacre_options {
    /* sizeof(nacre_options); fields are only ever added at the end. */
    size_t size;
    /* For the images' metadata, in the clear: trusted, and not in memory. It is made if it is not there. Required. */
    const char *directory;
    /* The text of a configuration, as nacre.toml has it: trust.policy, decryption_keys, registries, broker, ... Without a policy, which it
       may only go without by trust.insecure_policy, no image is opened. */
    const char *config;
    /* For ciphertext: need not be trusted, may be shared. NULL: what the configuration says, or else "lazy/chunks" in the directory. */
    const char *cache;
    /* The most bytes of it that are kept. 0: what the configuration says, or else 10 GiB. */
    uint64_t cache_limit;
    /* For how many seconds a read waits for a source that fails. 0: what the configuration says, or else 60. */
    uint32_t patience;
    /* 0 */
    uint32_t reserved;
} nacre_options;

#define NACRE_OPTIONS { sizeof(nacre_options), NULL, NULL, NULL, 0, 0, 0 }

typedef struct nacre_stat {
    uint64_t ino;
    /* Of a symbolic link the length of its target, of a directory that of its entries. */
    uint64_t size;
    int64_t mtime;
    uint32_t mtime_nanoseconds;
    /* As st_mode: type and permissions. */
    uint32_t mode;
    uint32_t links;
    uint32_t uid;
    uint32_t gid;
    uint32_t device_major;
    uint32_t device_minor;
    uint32_t reserved;
} nacre_stat;

typedef struct nacre_dirent {
    uint64_t ino;
    /* The type, as in st_mode. */
    uint32_t type;
    /* Bytes of the name, without the zero at its end. */
    uint32_t length;
    char name[256];
} nacre_dirent;

/* The last failure of a function that this thread called, in words; "" before there was one. It is good until the thread's next call. */
const char *nacre_error(void);

int nacre_store_open(const nacre_options *options, nacre_store **store);
void nacre_store_close(nacre_store *store);

/* Opens an image that `nacre image copy --lazy` made: docker://..., oci:DIR[:TAG], dir:..., or a name for registries.conf. If it has a trace,
   threads begin to fetch ahead what that names, until the image is closed. */
int nacre_image_open(nacre_store *store, const char *reference, nacre_image **image);
void nacre_image_close(nacre_image *image);
/* The digest of the image's manifest, as "sha256:..." */
const char *nacre_image_digest(const nacre_image *image);
/* The image config, JSON (environment, command, user, ...), which is as trusted as the image. It is good until the image is closed. */
const char *nacre_image_config(const nacre_image *image);

/* Follows a symbolic link at the end of the path; nacre_lstat does not. */
int nacre_stat_path(nacre_image *image, const char *path, nacre_stat *out);
int nacre_lstat_path(nacre_image *image, const char *path, nacre_stat *out);
/* The target, cut off after `length` bytes, without a zero at its end; its whole length is returned. */
ptrdiff_t nacre_readlink(nacre_image *image, const char *path, char *buffer, size_t length);

int nacre_open(nacre_image *image, const char *path, nacre_file **file);
void nacre_close(nacre_file *file);
int nacre_fstat(nacre_file *file, nacre_stat *out);
/* Fewer bytes than wanted come at the file's end only; 0 behind it. */
ptrdiff_t nacre_pread(nacre_file *file, void *buffer, size_t length, uint64_t offset);
/* From where the last nacre_read of this handle ended. */
ptrdiff_t nacre_read(nacre_file *file, void *buffer, size_t length);

int nacre_opendir(nacre_image *image, const char *path, nacre_dir **dir);
void nacre_closedir(nacre_dir *dir);
/* 1 with an entry ("." and ".." are among them), 0 at the end. */
int nacre_readdir(nacre_dir *dir, nacre_dirent *entry);
void nacre_rewinddir(nacre_dir *dir);

/* As getxattr(2) and listxattr(2): with a length of 0 the length is asked for; what does not fit is -ERANGE. Names end with a zero each. */
ptrdiff_t nacre_getxattr(nacre_image *image, const char *path, const char *name, void *buffer, size_t length);
ptrdiff_t nacre_lgetxattr(nacre_image *image, const char *path, const char *name, void *buffer, size_t length);
ptrdiff_t nacre_listxattr(nacre_image *image, const char *path, char *buffer, size_t length);
ptrdiff_t nacre_llistxattr(nacre_image *image, const char *path, char *buffer, size_t length);

#ifdef __cplusplus
}
#endif

#endif
