/* What a program that is not in Rust does with the library. Usage: reader DIRECTORY CONFIG CACHE REFERENCE COMMAND [ARGUMENT]
   Ends with 0, with the number of <errno.h> of what failed, or with 200 where the library does not do what its header says. */
#include "nacre.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TYPE 0170000

static int failed(const char *what, ptrdiff_t code)
{
    fprintf(stderr, "%s: %s\n", what, nacre_error());
    return (int)-code;
}

static void wrong(int line, const char *what)
{
    fprintf(stderr, "line %d: not so: %s (%s)\n", line, what, nacre_error());
    exit(200);
}
#define CHECK(what) do { if (!(what)) wrong(__LINE__, #what); } while (0)

static char *join(const char *directory, const char *name)
{
    char *path = malloc(strlen(directory) + strlen(name) + 2);
    CHECK(path != NULL);
    sprintf(path, "%s/%s", directory, name);
    return path;
}

/* FNV-1a of a file's content. */
static ptrdiff_t hash(nacre_image *image, const char *path, uint64_t *sum, uint64_t *size)
{
    static const size_t sizes[] = {1, 4096, 70000, 1000, 300000};
    unsigned char *buffer = malloc(300000);
    nacre_file *file = NULL;
    ptrdiff_t length = nacre_open(image, path, &file);
    size_t round;
    CHECK(buffer != NULL);
    *sum = 14695981039346656037u;
    *size = 0;
    for (round = 0; length >= 0; round++) {
        ptrdiff_t at;
        length = nacre_read(file, buffer, sizes[round % 5]);
        if (length <= 0)
            break;
        for (at = 0; at < length; at++)
            *sum = (*sum ^ buffer[at]) * 1099511628211u;
        *size += (uint64_t)length;
    }
    nacre_close(file);
    free(buffer);
    return length;
}

static int attributes(nacre_image *image, const char *path)
{
    char names[4096], value[4096];
    ptrdiff_t length = nacre_llistxattr(image, path, NULL, 0), at, size, byte;
    CHECK(length >= 0 && length <= (ptrdiff_t)sizeof names);
    CHECK(nacre_llistxattr(image, path, names, sizeof names) == length);
    for (at = 0; at < length; at += (ptrdiff_t)strlen(names + at) + 1) {
        size = nacre_lgetxattr(image, path, names + at, value, sizeof value);
        if (size < 0)
            return failed(path, size);
        CHECK(nacre_lgetxattr(image, path, names + at, NULL, 0) == size);
        CHECK(size == 0 || size == 1 || nacre_lgetxattr(image, path, names + at, value, (size_t)size - 1) == -ERANGE);
        printf(" %s=", names + at);
        for (byte = 0; byte < size; byte++)
            printf("%02x", (unsigned char)value[byte]);
    }
    return 0;
}

static int tree(nacre_image *image, const char *path)
{
    nacre_stat found;
    int code = nacre_lstat_path(image, *path == 0 ? "/" : path, &found), directory;
    if (code < 0)
        return failed(path, code);
    directory = (found.mode & TYPE) == 0040000;
    printf("%s %o %u:%u", path, (unsigned)found.mode, (unsigned)found.uid, (unsigned)found.gid);
    if (!directory)
        printf(" %u %" PRId64 ".%09u", (unsigned)found.links, found.mtime, (unsigned)found.mtime_nanoseconds);
    printf(" %u:%u", (unsigned)found.device_major, (unsigned)found.device_minor);
    if ((found.mode & TYPE) == 0120000) {
        char target[4096];
        ptrdiff_t length = nacre_readlink(image, path, target, sizeof target);
        CHECK(length == (ptrdiff_t)found.size && length < (ptrdiff_t)sizeof target);
        printf(" -> %.*s", (int)length, target);
    } else if ((found.mode & TYPE) == 0100000) {
        uint64_t sum, size;
        ptrdiff_t length = hash(image, path, &sum, &size);
        if (length < 0)
            return failed(path, length);
        CHECK(size == found.size);
        printf(" %" PRIu64 " %016" PRIx64, size, sum);
    }
    code = attributes(image, *path == 0 ? "/" : path);
    printf("\n");
    if (directory && code == 0) {
        nacre_dir *dir = NULL;
        nacre_dirent entry;
        unsigned dots = 0;
        code = nacre_opendir(image, *path == 0 ? "/" : path, &dir);
        if (code < 0)
            return failed(path, code);
        while ((code = nacre_readdir(dir, &entry)) == 1) {
            char *below;
            int inner;
            CHECK(strlen(entry.name) == entry.length);
            if (strcmp(entry.name, ".") == 0 || strcmp(entry.name, "..") == 0) {
                dots++;
                continue;
            }
            below = join(path, entry.name);
            CHECK(nacre_lstat_path(image, below, &found) == 0 && found.ino == entry.ino && (found.mode & TYPE) == entry.type);
            inner = tree(image, below);
            free(below);
            if (inner != 0) {
                nacre_closedir(dir);
                return inner;
            }
        }
        CHECK(code == 0 && dots == 2);
        nacre_rewinddir(dir);
        CHECK(nacre_readdir(dir, &entry) == 1);
        nacre_closedir(dir);
    }
    return code;
}

/* Handles are shared by threads. */
struct shared {
    nacre_image *image;
    nacre_file *file;
    uint64_t sum, size;
};

static void *reads(void *argument)
{
    struct shared *shared = argument;
    unsigned char *buffer = malloc(50000);
    uint64_t sum = 14695981039346656037u, offset = 0;
    ptrdiff_t length, at;
    CHECK(buffer != NULL && strcmp(nacre_error(), "") == 0);
    while ((length = nacre_pread(shared->file, buffer, 50000, offset)) > 0) {
        for (at = 0; at < length; at++)
            sum = (sum ^ buffer[at]) * 1099511628211u;
        offset += (uint64_t)length;
    }
    CHECK(length == 0 && sum == shared->sum && offset == shared->size);
    /* Each thread has its own last failure. */
    sprintf((char *)buffer, "/none-%p", (void *)buffer);
    CHECK(nacre_open(shared->image, (char *)buffer, &shared->file) == -ENOENT);
    CHECK(strstr(nacre_error(), (char *)buffer) != NULL);
    free(buffer);
    return NULL;
}

static int threads(nacre_image *image, const char *path)
{
    pthread_t ids[8];
    struct shared shared[8];
    nacre_file *file = NULL;
    uint64_t sum, size;
    int number;
    CHECK(hash(image, path, &sum, &size) == 0 && size > 500000);
    CHECK(nacre_open(image, path, &file) == 0);
    for (number = 0; number < 8; number++) {
        shared[number].image = image;
        shared[number].file = file;
        shared[number].sum = sum;
        shared[number].size = size;
        CHECK(pthread_create(&ids[number], NULL, reads, &shared[number]) == 0);
    }
    for (number = 0; number < 8; number++)
        CHECK(pthread_join(ids[number], NULL) == 0);
    nacre_close(file);
    printf("same\n");
    return 0;
}

/* Everything that can be asked wrongly. */
static int errors(nacre_store *store, nacre_image *image)
{
    char small[3], long_name[5000], *text = NULL;
    nacre_options options = NACRE_OPTIONS;
    nacre_store *no_store = (nacre_store *)&small;
    nacre_image *other = (nacre_image *)&small;
    nacre_file *file = (nacre_file *)&small;
    nacre_dir *dir = NULL;
    nacre_stat found;
    struct { nacre_options options; uint64_t later; } newer = {NACRE_OPTIONS, 1};

    CHECK(nacre_store_open(NULL, &no_store) == -EINVAL && no_store == NULL && strstr(nacre_error(), "options is NULL"));
    CHECK(nacre_store_open(&options, NULL) == -EINVAL);
    CHECK(nacre_store_open(&options, &no_store) == -EINVAL && strstr(nacre_error(), "directory"));
    options.size = 3;
    CHECK(nacre_store_open(&options, &no_store) == -EINVAL && strstr(nacre_error(), "sizeof"));
    newer.options.size = sizeof newer;
    newer.options.directory = "/nowhere";
    CHECK(nacre_store_open(&newer.options, &no_store) == -EINVAL && strstr(nacre_error(), "does not know"));
    options.size = sizeof options;
    options.directory = "";
    CHECK(nacre_store_open(&options, &no_store) == -EINVAL && no_store == NULL);
    options.directory = "/proc/none";
    CHECK(nacre_store_open(&options, &no_store) == -ENOENT);
    options.config = "rot = 1";
    CHECK(nacre_store_open(&options, &no_store) == -EINVAL && strstr(nacre_error(), "rot"));

    CHECK(nacre_image_open(NULL, "oci:/x", &other) == -EINVAL && other == NULL && strstr(nacre_error(), "store is NULL"));
    CHECK(nacre_image_open(store, NULL, &other) == -EINVAL && nacre_image_open(store, "oci:/x", NULL) == -EINVAL);
    CHECK(nacre_image_open(store, "oci:/there/is/none:v1", &other) == -ENOENT && strstr(nacre_error(), "/there/is/none"));
    CHECK(nacre_image_open(store, "\xff", &other) == -EINVAL && nacre_image_open(store, "docker://", &other) == -EINVAL);
    CHECK(nacre_image_digest(NULL) == NULL && nacre_image_config(NULL) == NULL);
    CHECK(strncmp(nacre_image_digest(image), "sha256:", 7) == 0 && strstr(nacre_image_config(image), "PATH=/of/the/config"));

    CHECK(nacre_open(image, "/none", &file) == -ENOENT && file == NULL && strstr(nacre_error(), "/none"));
    CHECK(nacre_open(image, "", &file) == -ENOENT && nacre_open(image, NULL, &file) == -EINVAL);
    CHECK(nacre_open(NULL, "noise", &file) == -EINVAL && nacre_open(image, "noise", NULL) == -EINVAL);
    CHECK(nacre_open(image, "noise/x", &file) == -ENOTDIR && nacre_open(image, "noise/", &file) == -ENOTDIR);
    CHECK(nacre_open(image, "noise/.", &file) == -ENOTDIR && nacre_open(image, "noise/..", &file) == -ENOTDIR);
    CHECK(nacre_open(image, "etc", &file) == -EISDIR && nacre_open(image, "pipe", &file) == -EINVAL);
    CHECK(nacre_open(image, "loop", &file) == -ELOOP && nacre_lstat_path(image, "loop", &found) == 0);
    memset(long_name, 'x', sizeof long_name);
    long_name[300] = 0;
    CHECK(nacre_open(image, long_name, &file) == -ENAMETOOLONG);
    long_name[300] = 'x';
    long_name[4999] = 0;
    CHECK(nacre_open(image, long_name, &file) == -ENAMETOOLONG);
    /* Links stay in the image, and so do dots. */
    CHECK(nacre_stat_path(image, "/../../etc/../out/passwd", &found) == 0 && found.size == 10);
    CHECK(nacre_stat_path(image, "absolute", &found) == 0 && found.size == 10);
    CHECK(nacre_lstat_path(image, "absolute", &found) == 0 && (found.mode & TYPE) == 0120000);
    CHECK(nacre_lstat_path(image, "to-etc/", &found) == 0 && (found.mode & TYPE) == 0040000);
    CHECK(nacre_stat_path(image, "etc", NULL) == -EINVAL && nacre_stat_path(NULL, "etc", &found) == -EINVAL);

    CHECK(nacre_open(image, "to-etc/passwd", &file) == 0);
    CHECK(nacre_fstat(file, &found) == 0 && found.size == 10 && nacre_fstat(NULL, &found) == -EINVAL);
    CHECK(nacre_pread(file, small, 3, 8) == 2 && memcmp(small, ":0", 2) == 0);
    CHECK(nacre_pread(file, small, 3, 10) == 0 && nacre_pread(file, small, 3, UINT64_MAX) == 0);
    CHECK(nacre_pread(file, text, 3, 0) == -EFAULT && nacre_pread(file, text, 0, 0) == 0);
    CHECK(nacre_pread(file, small, SIZE_MAX, 0) == -EINVAL && nacre_read(NULL, small, 3) == -EINVAL);
    CHECK(nacre_read(file, small, 3) == 3 && memcmp(small, "roo", 3) == 0);
    CHECK(nacre_read(file, small, 1) == 1 && small[0] == 't');
    nacre_close(file);

    CHECK(nacre_opendir(image, "noise", &dir) == -ENOTDIR && nacre_opendir(image, "none", &dir) == -ENOENT && dir == NULL);
    CHECK(nacre_opendir(image, "etc", &dir) == 0 && nacre_readdir(dir, NULL) == -EINVAL && nacre_readdir(NULL, NULL) == -EINVAL);
    nacre_closedir(dir);
    CHECK(nacre_readlink(image, "absolute", small, 3) == 21 && memcmp(small, "/to", 3) == 0);
    CHECK(nacre_readlink(image, "etc", small, 3) == -EINVAL && nacre_readlink(image, "none", small, 3) == -ENOENT);
    CHECK(nacre_getxattr(image, "noise", "user.none", small, 3) == -ENODATA);
    CHECK(nacre_getxattr(image, "noise", "what", small, 3) == -ENODATA && nacre_getxattr(image, "noise", NULL, small, 3) == -EINVAL);
    CHECK(nacre_listxattr(image, "none", small, 3) == -ENOENT && nacre_listxattr(image, "etc/passwd", small, 3) == -ERANGE);
    CHECK(nacre_listxattr(image, "absolute", NULL, 0) == 12 && nacre_llistxattr(image, "absolute", NULL, 0) == 0);

    nacre_close(NULL);
    nacre_closedir(NULL);
    nacre_image_close(NULL);
    nacre_store_close(NULL);
    printf("all refused\n");
    return 0;
}

int main(int count, char **arguments)
{
    nacre_options options = NACRE_OPTIONS;
    nacre_store *store = NULL;
    nacre_image *image = NULL;
    const char *command;
    int code;

    CHECK(count >= 6 && strcmp(nacre_error(), "") == 0);
    command = arguments[5];
    options.directory = arguments[1];
    options.config = arguments[2];
    options.cache = arguments[3];
    options.patience = 1;
    code = nacre_store_open(&options, &store);
    if (code != 0)
        return failed("store", code);
    code = nacre_image_open(store, arguments[4], &image);
    if (code != 0) {
        nacre_store_close(store);
        return failed("image", code);
    }
    if (strcmp(command, "errors") == 0) {
        code = errors(store, image);
    } else if (strcmp(command, "threads") == 0 && count == 7) {
        code = threads(image, arguments[6]);
    } else if (strcmp(command, "tree") == 0) {
        code = tree(image, "");
    } else if (strcmp(command, "late") == 0) {
        /* A file outlives its image, and that the store. */
        nacre_file *file = NULL;
        char byte;
        CHECK(nacre_open(image, "noise", &file) == 0);
        nacre_store_close(store);
        nacre_image_close(image);
        CHECK(nacre_pread(file, &byte, 1, 600000) == 1);
        nacre_close(file);
        printf("late\n");
        return 0;
    } else {
        code = 200;
    }
    nacre_image_close(image);
    nacre_store_close(store);
    return code;
}
