# From the layers of sql/: what an upgrade can run again, because it replaces what is there. Functions and views (OR
# REPLACE), comments, owners and the grants among them. What can't be replaced (tables, types, triggers) is left out: an
# upgrade script says by hand how it changed. A statement ends with a line that ends in ";" outside of $-quotes.

function finish() {
    if (sub(/^CREATE FUNCTION /, "CREATE OR REPLACE FUNCTION ", statement) ||
        sub(/^CREATE VIEW /, "CREATE OR REPLACE VIEW ", statement) ||
        statement ~ /^COMMENT ON / || statement ~ /^GRANT / || statement ~ /^SELECT outbox\._close\(\);/)
        printf "%s\n", statement
    statement = ""
}

# The tag of the $-quote that is open at the end of this line, or nothing.
function quoted(line, tag,    at) {
    while (match(line, /\$[A-Za-z_]*\$/)) {
        at = substr(line, RSTART, RLENGTH)
        line = substr(line, RSTART + RLENGTH)
        if (tag == "") tag = at
        else if (tag == at) tag = ""
    }
    return tag
}

tag == "" && statement == "" && /^[ \t]*(--.*|\\.*)?$/ { next }
{
    statement = statement $0 "\n"
    tag = quoted($0, tag)
    if (tag == "" && $0 ~ /;[ \t]*(--.*)?$/) finish()
}
END { if (statement != "") { print "a statement does not end: " statement > "/dev/stderr"; exit 1 } }
