"""Common English words for the quickstart's skills, all of them three to nine letters long."""

_TEXT = """
able above acid across actor afraid after again agree air album alive almost alone along also always amber
angle animal answer apple april arch arm army around arrow art ask atlas aunt autumn awake baby back bacon
badge bag baker ball banana band bank barn basket bath beach bean bear beauty bed bee before begin bell belt
bench berry best better big bird birth bitter black blade blank blue board boat body bone book boot border
bottle bottom box boy brain branch brave bread break bridge bright bring brother brown brush bucket build
burn bus bush busy butter button cabin cake call calm camel camera camp candle captain car card care carpet
carrot castle cat catch cattle cave chain chair chalk change cheap cheese cherry chest chicken child circle
city class clay clean clear clever cliff climb clock cloud coast coat coffee cold colour comb common cook
copper corn corner cotton count country cousin cover cow cream crowd crown cup curtain curve dance danger
dark daughter dawn day dear deep desert desk diamond dinner dirt doctor dog doll door double dragon dream
dress drink drive drop drum dry duck dust eager eagle ear early earth east easy echo edge egg eight elbow
empty engine enjoy enough evening every face fair fall family famous farm fast father feather fence field
finger fire first fish flag flame flat floor flour flower fly fog food foot forest fork forward fox free
fresh friend frog fruit full funny garden gate gentle ghost giant gift giraffe girl glad glass globe glove
goat gold good goose grain grape grass great green grey ground group guard guest guitar hair half hammer
hand happy harbour hard harvest hat head heart heavy height help hen hero hill history holiday home honest
honey hope horse hospital hot hotel hour house hungry ice idea inch infant ink insect iron island ivory
jacket jam jelly jewel join joke journey juice jump jungle just keen keep kettle key kind king kitchen kite
kitten knee knife ladder lady lake lamb lamp land language large late laugh lawn lazy leaf learn leather
left lemon lesson letter library light lily line lion listen little lizard local long lost loud love low
lucky lunch machine magic magnet maize make manner map marble march market mask master match meadow meal
medal melon memory metal middle milk mill minute mirror model moment money monkey month moon morning mother
motor mountain mouse mouth music nail name narrow nature near neck needle neighbour nest never night noble
noise north nose note number nurse ocean office often old olive onion open orange orchard other oven owl
oxygen page paint pair palace pan paper parent park parrot party path peace peach pear pen pencil people
pepper perfect piano picture pig pillow pilot pink pipe planet plant plate play pocket poem point polite
pond pony poor potato pretty prince print prize proud pump pupil purple puzzle queen quick quiet rabbit
radio rain rapid raven ready record red repair rest ribbon rice rich right ring ripe river road rock roof
room root rope rose rough round rubber ruler run sad saddle safe sail salad salt sand scarf school science
sea season second secret seed seven shadow sharp sheep shelf shell ship shirt shoe shop shore short shout
silent silk silver simple sister size skill skin sky sleep slow small smart smile smoke smooth snail snake
snow soap soft soldier song soup south space spade spider spirit spoon spring square stable stair star
station steam steel stick stone storm story straw street strong student study sugar summer sun supper
sweet swim table tail tailor tall tea teacher temple ten tent thick thin thing thirty throat thumb ticket
tide tiger timber time tin tired title toast today tomato tongue tooth tower town trade train travel tree
triangle trip truck true trumpet trust tunnel turkey turtle twelve twenty uncle under uniform useful valley
velvet village violin voice voyage wagon walk wall walnut warm wash water wave weather week west wheat wheel
whisper white whole wide wild window wing winter wise wolf woman wood wool word work world writer wrong
yard year yellow yesterday young zebra zero zoo
"""

COMMON_WORDS: tuple[str, ...] = tuple(_TEXT.split())
